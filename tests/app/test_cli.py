"""`python -m app`: help texts, and messages for wrong settings."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from app.settings import LORA_RANKS, Settings

ROOT = Path(__file__).parent.parent.parent


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        capture_output=True, text=True, cwd=ROOT, check=False, env=environment, timeout=60,
    )  # fmt: skip


def test_help_names_every_setting() -> None:
    text = _run("serve", "--help").stdout
    for name in Settings.model_fields.keys() - {"admin_key", "publish_roots", "sources", "private_networks"}:
        assert f"XINGLIN_{name.upper()}" in "".join(text.split())


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"XINGLIN_PORT": "http"}, "XINGLIN_PORT"),
        ({"XINGLIN_MAX_LORA_RANK": "17"}, "XINGLIN_MAX_LORA_RANK"),
        ({"XINGLIN_MAX_RESIDENT": "4", "XINGLIN_MAX_LORAS": "4"}, "max_resident is 4"),
        ({"XINGLIN_SOURCES": "hf:// ftp://somewhere/"}, "ftp://somewhere/"),
        ({"XINGLIN_PRIVATE_NETWORKS": "10.0.0.0/8 nonsense"}, "nonsense"),
    ],
)
def test_a_wrong_setting_is_named(environment: dict[str, str], named: str) -> None:
    result = _run("serve", **environment)
    assert result.returncode == 2
    assert named in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("rank", LORA_RANKS)
def test_ranks_are_read_from_text(rank: int) -> None:
    assert Settings(max_lora_rank=str(rank)).max_lora_rank == rank  # type: ignore[arg-type]


def test_a_missing_demo_base_model_says_how_to_make_one(tmp_path: Path) -> None:
    result = _run("serve", "--data-dir", str(tmp_path))
    assert result.returncode == 2
    assert "python -m training demo" in result.stderr


def test_a_port_in_use_is_reported(tmp_path: Path) -> None:
    (tmp_path / "models" / "xinglin-demo").mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = _run("serve", "--data-dir", str(tmp_path), "--port", port)
    assert result.returncode == 1
    assert port in result.stderr
    assert "XINGLIN_PORT" in result.stderr
