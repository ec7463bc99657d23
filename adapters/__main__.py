"""The operator's way to the store: python -m adapters validate | publish | list | show | alias | ..."""

import argparse
import getpass
import os
import sys
from pathlib import Path

from adapters.errors import AdapterError, InvalidAdapter
from adapters.ref import DEFAULT_ALIAS, AdapterRef, check_alias
from adapters.store import AdapterStore
from adapters.validate import validate


def main() -> int:
    """Run one command; 0 when it did what it was asked, 1 with the reason on stderr when it could not."""
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
    facts = validate(arguments.folder)
    print(
        f"valid: r {facts.r}, {len(facts.target_modules)} target modules, {facts.golden_prompts} golden prompts"
    )
    if not facts.golden_prompts:
        print(
            "without golden prompts it is unproven: a service loads it only with XINGLIN_ALLOW_UNPROVEN=true"
        )


def _publish(store: AdapterStore, arguments: argparse.Namespace) -> None:
    if arguments.alias:
        check_alias(arguments.alias)  # before anything is published
    manifest = store.publish(arguments.folder, arguments.name, actor=_actor(), why=arguments.why)
    print(f"{manifest.name}@{manifest.revision}")
    if arguments.alias:
        store.set_alias(manifest.name, arguments.alias, manifest.revision, actor=_actor(), why=arguments.why)


def _list(store: AdapterStore, _: argparse.Namespace) -> None:
    for name in store.names():
        pointed: dict[str, list[str]] = {}
        for alias, revision in store.aliases(name).items():
            pointed.setdefault(revision, []).append(alias)
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


def _rollback(store: AdapterStore, arguments: argparse.Namespace) -> None:
    revision = store.rollback(arguments.name, arguments.alias, actor=_actor(), why=arguments.why)
    print(f"{arguments.name}@{arguments.alias} -> {revision}")


def _prune(store: AdapterStore, arguments: argparse.Namespace) -> None:
    for revision in store.prune(arguments.name, keep=arguments.keep, actor=_actor(), why=arguments.why):
        print(f"removed {arguments.name}@{revision}")


def _actor() -> str:
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):  # in a container, a user id may have no name
        return f"cli:{os.getuid()}"


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("it must be a whole number, 0 or above")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adapters",
        description="Look after the adapter store. A running service follows the aliases: it loads and proves "
        "what an alias points at before it answers with it.",
        epilog="example: python -m adapters publish xinglin-data/runs/RUN/result --name doctor --alias default",
    )
    default = Path(os.environ.get("XINGLIN_DATA_DIR", "xinglin-data"), "store")
    parser.add_argument(
        "--store", type=Path, default=default, help="the store's folder (default: %(default)s)"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("validate", help="say all that is wrong with a folder")
    command.add_argument("folder", type=Path)
    command.set_defaults(run=_validate)

    command = commands.add_parser("publish", help="make a folder a revision of an adapter")
    command.add_argument("folder", type=Path)
    command.add_argument("--name", required=True, help="the adapter's name")
    command.add_argument("--alias", help="point this alias at it too")
    command.add_argument("--why", default="", help="kept in the adapter's log")
    command.set_defaults(run=_publish)

    command = commands.add_parser("list", help="all revisions, with the aliases that point at them")
    command.set_defaults(run=_list)

    command = commands.add_parser("show", help="one revision's manifest, and the adapter's log")
    command.add_argument("ref", help="name, name@alias or name@revision")
    command.set_defaults(run=_show)

    command = commands.add_parser("alias", help="point an alias at a revision")
    command.add_argument("target", help="name@revision (or name@alias, for what that alias points at)")
    command.add_argument("alias")
    command.add_argument("--why", default="", help="kept in the adapter's log")
    command.set_defaults(run=_alias)

    command = commands.add_parser("rollback", help="point an alias back at its revision before")
    command.add_argument("name")
    command.add_argument("--alias", default=DEFAULT_ALIAS, help="(default: %(default)s)")
    command.add_argument("--why", default="", help="kept in the adapter's log")
    command.set_defaults(run=_rollback)

    command = commands.add_parser("prune", help="remove old revisions that nothing needs")
    command.add_argument("name")
    command.add_argument(
        "--keep", type=_count, default=5, help="newest revisions to keep (default: %(default)s)"
    )
    command.add_argument("--why", default="", help="kept in the adapter's log")
    command.set_defaults(run=_prune)
    return parser


if __name__ == "__main__":
    sys.exit(main())
