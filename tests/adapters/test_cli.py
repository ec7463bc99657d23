"""python -m adapters: commands and their output."""

import getpass
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters import AdapterRef, AdapterStore
from adapters.__main__ import main
from tests.adapters.conftest import Start
from tests.adapters.folders import GOLDEN, Folder, make_folder

Run = Callable[..., str]


@pytest.fixture
def run(store: AdapterStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run one command on the store and return its output; assert that it fails if and only if `fails`."""

    def run(*arguments: str | Path, fails: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["adapters", "--store", str(store.root), *map(str, arguments)])
        code = main()
        printed = capsys.readouterr()
        assert code == int(fails), printed
        assert (printed.out if fails else printed.err) == ""
        return (printed.err if fails else printed.out).strip()

    return run


@pytest.fixture
def published(run: Run, tmp_path: Path) -> list[str]:
    """Refs of three revisions; `default` pointed at each in turn."""
    folders = [make_folder(tmp_path / f"seed-{seed}", seed).write() for seed in range(3)]
    return [
        run("publish", folder, "--name", "doctor", "--alias", "default", "--why", "更好")
        for folder in folders
    ]


def test_validate(adapter: Folder, run: Run) -> None:
    assert run("validate", adapter.write()) == (
        "valid: r 4, 2 target modules, 0 golden prompts\n"
        "without golden prompts it cannot be proved: a service loads it only with XINGLIN_ALLOW_UNPROVEN=true"
    )
    adapter.golden = [GOLDEN]
    assert run("validate", adapter.write()) == "valid: r 4, 2 target modules, 1 golden prompts"


def test_each_problem_is_printed_on_a_line(adapter: Folder, run: Run) -> None:
    adapter.config |= {"r": 0, "use_dora": True}
    for command in (["validate", adapter.write()], ["publish", adapter.path, "--name", "doctor"]):
        title, *problems = run(*command, fails=True).splitlines()
        assert title == "This adapter cannot be served:"
        assert [problem[:10] for problem in problems] == ["  - r is 0", "  - use_do"]


def test_publish_prints_the_ref_and_points_the_alias(
    adapter: Folder, run: Run, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "li")
    ref = run("publish", adapter.write(), "--name", "doctor", "--alias", "canary", "--why", "月度更新")
    assert AdapterRef.parse(ref) == AdapterRef("doctor", revision=store.aliases("doctor")["canary"])
    assert [(entry.action, entry.actor, entry.why) for entry in store.log("doctor")] == [
        ("publish", "cli:li", "月度更新"),
        ("point", "cli:li", "月度更新"),
    ]


def test_bad_alias_is_refused_before_publishing(adapter: Folder, run: Run, store: AdapterStore) -> None:
    error = run("publish", adapter.write(), "--name", "doctor", "--alias", "no good", fails=True)
    assert error.startswith("'no good' cannot name an alias")
    assert store.names() == []


def test_list(run: Run, published: list[str], adapter: Folder) -> None:
    run("alias", published[0], "canary")
    run("alias", published[0], "stable")
    lines = run("list").splitlines()
    assert [line.split()[0] for line in lines] == published
    assert re.fullmatch(
        r"doctor@\w{12}  20\d\d-\d\d-\d\d \d\d:\d\d  sft       chat    canary, stable", lines[0]
    )
    assert lines[1].endswith("chat    ")
    assert lines[2].endswith("chat    default")


def test_an_empty_store_lists_nothing(run: Run, store: AdapterStore) -> None:
    assert run("list") == ""
    assert not store.root.exists()


@pytest.mark.parametrize("ref", ["doctor", "doctor@default", None])
def test_show(run: Run, store: AdapterStore, published: list[str], ref: str | None) -> None:
    text = run("show", ref or published[-1])
    manifest, end = json.JSONDecoder().raw_decode(text)
    assert f"{manifest['name']}@{manifest['revision']}" == published[-1]
    log = [json.loads(line) for line in text[end:].strip().splitlines()]
    assert [entry["action"] for entry in log] == ["publish", "point"] * 3
    assert log[0]["why"] == "更好"


def test_alias(run: Run, store: AdapterStore, published: list[str]) -> None:
    revisions = [AdapterRef.parse(ref).revision for ref in published]
    assert run("alias", published[0], "canary") == f"doctor@canary -> {revisions[0]}"
    assert run("alias", "doctor@canary", "default") == f"doctor@default -> {revisions[0]}"
    assert run("alias", "doctor", "stable") == f"doctor@stable -> {revisions[0]}"
    assert set(store.aliases("doctor").values()) == {revisions[0]}


def test_rollback(run: Run, published: list[str]) -> None:
    revisions = [AdapterRef.parse(ref).revision for ref in published]
    assert run("rollback", "doctor") == f"doctor@default -> {revisions[1]}"
    assert (
        run("rollback", "doctor", "--alias", "default", "--why", "x") == f"doctor@default -> {revisions[0]}"
    )
    assert run("rollback", "doctor", fails=True) == (
        f"doctor@default has no previous revision before {revisions[0]}"
    )


def test_prune(run: Run, published: list[str], tmp_path: Path) -> None:
    assert run("prune", "doctor") == ""  # the default keeps five
    assert run("prune", "doctor", "--keep", "1") == f"removed {published[0]}"
    assert [line.split()[0] for line in run("list").splitlines()] == published[1:]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["show", "nobody"], "there is no adapter nobody@default"),
        (["show", "doctor@canary"], "there is no adapter doctor@canary"),
        (["show", "doctor@000000000000"], "there is no revision doctor@000000000000"),
        (["show", "../x"], "'../x' cannot name an adapter: "),
        (["alias", "doctor", "0123456789ab"], "'0123456789ab' cannot name an alias: "),
        (["alias", "nobody", "canary"], "there is no adapter nobody@default"),
        (["rollback", "nobody"], "there is no adapter nobody"),
        (["rollback", "doctor", "--alias", "canary"], "there is no adapter doctor@canary"),
        (["prune", "nobody"], "there is no adapter nobody"),
        (
            ["publish", "/nowhere", "--name", "x"],
            "This adapter cannot be served:\n  - folder not found: ",
        ),
        (["validate", "/nowhere"], "This adapter cannot be served:\n  - folder not found: "),
    ],
)
@pytest.mark.usefixtures("published")
def test_error_messages(run: Run, arguments: list[str], error: str) -> None:
    assert run(*arguments, fails=True).startswith(error)


def test_system_errors_are_shown(adapter: Folder, run: Run, store: AdapterStore) -> None:
    store.root.write_text("a file where the store should be")
    error = run("publish", adapter.write(), "--name", "doctor", fails=True)
    assert "Not a directory" in error
    assert "\n" not in error


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["prune", "doctor", "--keep", "-1"], ["publish", "x"]]
)
def test_wrong_usage_exits_with_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["adapters", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyError, OSError])
def test_a_user_without_a_name_can_publish(
    adapter: Folder, run: Run, store: AdapterStore, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """A container may run under any user id. Python 3.13 raises OSError; earlier versions raise KeyError."""

    def nobody() -> str:
        raise error("uid not found")

    monkeypatch.setattr(getpass, "getuser", nobody)
    run("publish", adapter.write(), "--name", "doctor")
    assert re.fullmatch(r"cli:\d+", store.log("doctor")[0].actor)


def test_as_a_separate_process(adapter: Folder, tmp_path: Path, start: Start) -> None:
    """The store is in the service's data directory."""
    environment = {"XINGLIN_DATA_DIR": str(tmp_path / "data")}
    process = start("-m", "adapters", "publish", adapter.write(), "--name", "doctor", **environment)
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert AdapterStore(tmp_path / "data" / "store").get(AdapterRef.parse(printed.strip()))

    adapter.config["r"] = 0
    process = start("-m", "adapters", "validate", adapter.write(), **environment)
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode, printed) == (1, "")
    assert errors.splitlines()[0] == "This adapter cannot be served:"
