"""Command line of the adapter store: python -m adapters validate | publish | list | show | alias | ..."""

import argparse
import getpass
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters.archive import unpack
from adapters.diff import diff, render
from adapters.errors import AdapterError, InvalidAdapter
from adapters.ref import DEFAULT_ALIAS, AdapterRef, check_alias
from adapters.store import AdapterStore
from adapters.traffic import CANARY, SHADOW
from adapters.validate import validate

_MAX_UNPACKED_BYTES = 16 << 30


def main() -> int:
    """Run one command. Return 0 on success, or 1 with the reason on stderr."""
    arguments = _parser().parse_args()
    store = AdapterStore(arguments.store)
    try:
        arguments.run(store, arguments)
    except InvalidAdapter as error:
        print("This adapter cannot be served:", file=sys.stderr)
        print(*(f"  - {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        return 1
    except (AdapterError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _validate(_: AdapterStore, arguments: argparse.Namespace) -> None:
    with _folder(arguments.folder) as folder:
        facts = validate(folder)
    print(
        f"valid: r {facts.r}, {len(facts.target_modules)} target modules, {facts.golden_prompts} golden prompts"
    )
    if not facts.golden_prompts:
        print(
            "without golden prompts it cannot be proved: a service loads it only with XINGLIN_ALLOW_UNPROVEN=true"
        )


def _publish(store: AdapterStore, arguments: argparse.Namespace) -> None:
    if arguments.alias:
        check_alias(arguments.alias)  # before anything is published
    with _folder(arguments.folder) as folder:
        manifest = store.publish(folder, arguments.name, actor=_actor(), why=arguments.why)
    print(manifest.ref)
    if arguments.alias:
        store.set_alias(manifest.name, arguments.alias, manifest.revision, actor=_actor(), why=arguments.why)


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """Yield the adapter's folder; an archive is unpacked into a temporary one."""
    if not path.is_file():
        yield path
        return
    with tempfile.TemporaryDirectory() as temporary:
        unpack(path, Path(temporary), max_bytes=_MAX_UNPACKED_BYTES)
        yield Path(temporary)


def _list(store: AdapterStore, _: argparse.Namespace) -> None:
    for name in store.names():
        traffic = store.traffic(name).model_dump()
        pointed: dict[str, list[str]] = {}
        for alias, revision in store.aliases(name).items():
            share = f" {traffic[alias]:g} %" if traffic.get(alias) else ""
            pointed.setdefault(revision, []).append(alias + share)
        for manifest in store.revisions(name):
            marks = ", ".join(pointed.get(manifest.revision, []))
            created = manifest.created_at.strftime("%Y-%m-%d %H:%M")
            print(f"{name}@{manifest.revision}  {created}  {manifest.stage:8}  {manifest.task:6}  {marks}")


def _show(store: AdapterStore, arguments: argparse.Namespace) -> None:
    ref = AdapterRef.parse(arguments.ref)
    print(store.get(ref).model_dump_json(indent=2))
    for entry in store.log(ref.name):
        print(entry.model_dump_json(exclude_none=True))


def _alias(store: AdapterStore, arguments: argparse.Namespace) -> None:
    target = store.get(AdapterRef.parse(arguments.target))
    store.set_alias(target.name, arguments.alias, target.revision, actor=_actor(), why=arguments.why)
    print(f"{target.name}@{arguments.alias} -> {target.revision}")


def _unalias(store: AdapterStore, arguments: argparse.Namespace) -> None:
    store.remove_alias(arguments.name, arguments.alias, actor=_actor(), why=arguments.why)
    print(f"removed {arguments.name}@{arguments.alias}")


def _rollback(store: AdapterStore, arguments: argparse.Namespace) -> None:
    revision = store.rollback(
        arguments.name, arguments.alias, to=arguments.to, actor=_actor(), why=arguments.why
    )
    print(f"{arguments.name}@{arguments.alias} -> {revision}")


def _split(store: AdapterStore, arguments: argparse.Namespace) -> None:
    ref, alias = AdapterRef.parse(arguments.target), arguments.alias
    store.get(AdapterRef(ref.name, alias=DEFAULT_ALIAS))  # the share is taken from its requests
    if "@" in arguments.target:
        store.set_alias(ref.name, alias, store.get(ref).revision, actor=_actor(), why=arguments.why)
    store.split(ref.name, alias, arguments.percent, actor=_actor(), why=arguments.why)
    revision = store.aliases(ref.name)[alias]
    print(f"{ref.name}@{alias} -> {revision} with {arguments.percent:g} % of the requests")


def _promote(store: AdapterStore, arguments: argparse.Namespace) -> None:
    revision = store.promote(arguments.name, actor=_actor(), why=arguments.why)
    print(f"{arguments.name}@{DEFAULT_ALIAS} -> {revision}")


def _abort(store: AdapterStore, arguments: argparse.Namespace) -> None:
    store.remove_alias(arguments.name, arguments.alias, actor=_actor(), why=arguments.why)
    print(f"ended {arguments.name}@{arguments.alias}")


def _diff(store: AdapterStore, arguments: argparse.Namespace) -> None:
    old, new = (store.get(AdapterRef.parse(ref)) for ref in (arguments.old, arguments.new))
    print(render(diff(store.folder(old.name, old.revision), store.folder(new.name, new.revision))))


def _prune(store: AdapterStore, arguments: argparse.Namespace) -> None:
    for revision in store.prune(arguments.name, keep=arguments.keep, actor=_actor(), why=arguments.why):
        print(f"removed {arguments.name}@{revision}")


def _actor() -> str:
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):  # in a container, the user id may have no name
        return f"cli:{os.getuid()}"


def _percent(text: str) -> float:
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError("must be a number from 0 to 100")
    return value


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("must be a whole number, 0 or more")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adapters",
        description="Manage the adapter store. A running service follows the aliases: it loads and proves a "
        "revision before it answers with it.",
        epilog="example: python -m adapters publish xinglin-data/runs/RUN/result --name doctor --alias default",
    )
    default = Path(os.environ.get("XINGLIN_DATA_DIR", "xinglin-data"), "store")
    parser.add_argument(
        "--store", type=Path, default=default, help="folder of the store (default: %(default)s)"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _add_contents(commands)
    _add_pointing(commands)
    return parser


def _add_contents(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("validate", help="list every problem of an adapter folder")
    command.add_argument("folder", type=Path, help="a folder, or a .tar.gz or .zip of one")
    command.set_defaults(run=_validate)

    command = commands.add_parser("publish", help="add a folder to the store as a revision of an adapter")
    command.add_argument("folder", type=Path, help="a folder, or a .tar.gz or .zip of one")
    command.add_argument("--name", required=True, help="name of the adapter")
    command.add_argument("--alias", help="also point this alias at the new revision")
    _add_why(command)
    command.set_defaults(run=_publish)

    command = commands.add_parser("list", help="list all revisions and their aliases")
    command.set_defaults(run=_list)

    command = commands.add_parser("show", help="show a revision's manifest and the adapter's log")
    command.add_argument("ref", help="name, name@alias or name@revision")
    command.set_defaults(run=_show)

    command = commands.add_parser(
        "diff", help="show which modules changed between two revisions, and by how much"
    )
    command.add_argument("old", help="name, name@alias or name@revision")
    command.add_argument("new")
    command.set_defaults(run=_diff)

    command = commands.add_parser("prune", help="remove old revisions that are not in use")
    command.add_argument("name")
    command.add_argument(
        "--keep", type=_count, default=5, help="number of newest revisions to keep (default: %(default)s)"
    )
    _add_why(command)
    command.set_defaults(run=_prune)


def _add_pointing(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("alias", help="point an alias at a revision")
    command.add_argument("target", help="name@revision, or name@alias for the revision of that alias")
    command.add_argument("alias")
    _add_why(command)
    command.set_defaults(run=_alias)

    command = commands.add_parser("unalias", help="remove an alias; its revision stays")
    command.add_argument("name")
    command.add_argument("alias")
    _add_why(command)
    command.set_defaults(run=_unalias)

    command = commands.add_parser(
        "rollback", help="point an alias at its previous revision, or at another one"
    )
    command.add_argument("name")
    command.add_argument("--alias", default=DEFAULT_ALIAS, help="(default: %(default)s)")
    command.add_argument(
        "--to", metavar="REVISION", help="revision to roll back to (default: the previous one)"
    )
    _add_why(command)
    command.set_defaults(run=_rollback)

    for alias, text in (
        (CANARY, "send a share of the requests to a revision; a session always gets the same one"),
        (SHADOW, "send copies of a share of the requests to a revision; its answers are only compared"),
    ):
        command = commands.add_parser(alias, help=text)
        command.add_argument("target", help="name@revision, or only the name to change the share")
        command.add_argument("percent", type=_percent, help="share of the requests in percent, 0 to 100")
        _add_why(command)
        command.set_defaults(run=_split, alias=alias)

    command = commands.add_parser(
        "promote", help="point default at the canary's revision, and end the canary"
    )
    command.add_argument("name")
    _add_why(command)
    command.set_defaults(run=_promote)

    command = commands.add_parser("abort", help="end a canary or shadow at once")
    command.add_argument("name")
    command.add_argument("--alias", choices=(CANARY, SHADOW), default=CANARY, help="(default: %(default)s)")
    _add_why(command)
    command.set_defaults(run=_abort)


def _add_why(command: argparse.ArgumentParser) -> None:
    command.add_argument("--why", default="", help="reason, written to the adapter's log")


if __name__ == "__main__":
    sys.exit(main())
