"""python -m adapters: canary, shadow, promote, rollback and diff."""

import tarfile
from pathlib import Path

import pytest

from adapters import AdapterStore, Traffic
from tests.adapters.folders import make_folder
from tests.adapters.test_cli import Run, published, run

__all__ = ["published", "run"]  # fixtures


def test_canary_from_start_to_promotion(store: AdapterStore, run: Run, published: list[str]) -> None:
    first, _, third = (ref.partition("@")[2] for ref in published)
    said = run("canary", published[0], "10%", "--why", "a week's trial")
    assert said == f"doctor@canary -> {first} with 10 % of the requests"
    assert store.traffic("doctor") == Traffic(canary=10)
    assert f"doctor@{first}" in run("list")
    assert "canary 10 %" in run("list")
    assert run("canary", "doctor", "25") == f"doctor@canary -> {first} with 25 % of the requests"
    assert run("promote", "doctor") == f"doctor@default -> {first}"
    assert store.aliases("doctor") == {"default": first}
    assert run("rollback", "doctor") == f"doctor@default -> {third}"


def test_abort_and_unalias(store: AdapterStore, run: Run, published: list[str]) -> None:
    run("canary", published[0], "10")
    run("shadow", published[1], "5")
    assert store.traffic("doctor") == Traffic(canary=10, shadow=5)
    assert run("abort", "doctor") == "ended doctor@canary"
    assert run("abort", "doctor", "--alias", "shadow") == "ended doctor@shadow"
    assert store.traffic("doctor") == Traffic()
    assert "there is no adapter doctor@canary" in run("abort", "doctor", fails=True)
    assert "there is no adapter doctor@canary" in run("promote", "doctor", fails=True)
    assert run("unalias", "doctor", "default") == "removed doctor@default"
    assert "there is no adapter doctor@default" in run("canary", published[0], "10", fails=True)
    assert store.aliases("doctor") == {}


@pytest.mark.parametrize("percent", ["-1", "101", "nan", "ten", ""])
def test_invalid_percentage(run: Run, published: list[str], percent: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("canary", published[0], percent)


def test_roll_back_to_any_revision(run: Run, published: list[str]) -> None:
    first = published[0].partition("@")[2]
    assert run("rollback", "doctor", "--to", first) == f"doctor@default -> {first}"
    assert "there is no revision doctor@000000000000" in run(
        "rollback", "doctor", "--to", "0" * 12, fails=True
    )


def test_diff(run: Run, published: list[str]) -> None:
    lines = run("diff", published[0], "doctor").splitlines()
    assert lines[0].split()[:4] == ["module", "old", "new", "moved"]
    assert any("q_proj" in line for line in lines[1:])
    assert "there is no revision" in run("diff", published[0], "doctor@000000000000", fails=True)


def test_archive_is_published_like_its_folder(run: Run, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "packed").write()
    archive = tmp_path / "doctor.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "doctor")
    assert run("validate", archive).startswith("valid: r 4")
    assert run("publish", archive, "--name", "packed") == run("publish", folder, "--name", "packed")
    archive.write_bytes(archive.read_bytes()[:200])
    assert "This adapter cannot be served" in run("publish", archive, "--name", "packed", fails=True)
