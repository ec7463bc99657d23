"""The commands for data and results, called as from the command line."""

from pathlib import Path
from shutil import copytree

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training.artifacts.test_merge import adapter_logits, close, logits, trained
from tests.training.coded_models import modules_below, with_own_code
from tests.training.jobs import SFT
from tests.training.test_main import call

WORD = "肾上腺素"


@pytest.fixture
def coded(tiny_dir: Path, tmp_path: Path) -> Path:
    return with_own_code(tiny_dir / "models" / "tiny", tmp_path / "coded")


@pytest.fixture
def adapter(tiny_dir: Path, tmp_path: Path) -> Path:
    folder = trained(tiny_dir / "models" / "tiny", tmp_path / "doctor", seed=1)
    (folder / "provenance.json").unlink()  # which ties it to that base
    return folder


@pytest.mark.parametrize("command", ["merge", "export"])
def test_code_of_the_base_runs_only_with_the_flag(
    command: str,
    tiny_dir: Path,
    coded: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "merged"
    arguments = (command, adapter, "--base", coded, "--out", out)
    assert call(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "base model coded needs Python code that comes with it: give --trust-remote-code if you have read and "
        "trust that code"
    )
    assert not out.exists()

    modules_below(tmp_path / "modules", monkeypatch)
    assert call(monkeypatch, *arguments, "--trust-remote-code") == 0
    merged = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(merged).__name__ == "Homemade"
    assert close(logits(merged), adapter_logits(tiny_dir / "models" / "tiny", adapter))
    assert type(AutoTokenizer.from_pretrained(out, trust_remote_code=True)).__name__ == "Words"


def test_a_plain_folder_rejects_the_trust_flag(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("export", "doctor", "--out", tmp_path / "out", "--adapter-only", "--trust-remote-code")
    assert call(monkeypatch, *arguments) == 2
    assert "--trust-remote-code has no effect with --adapter-only" in capsys.readouterr().err


def test_preview_shows_what_pt_reads(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a base without a chat template, with new tokens."""
    mute = copytree(tiny_dir / "models" / "tiny", tmp_path / "mute")
    (mute / "chat_template.jinja").unlink()
    (tmp_path / "texts.txt").write_text(f"{WORD}。\nRest.\n")
    job = {
        "stage": "pt", "name": "reader", "base_model": str(mute), "train_files": [str(tmp_path / "texts.txt")],
        "merge": True, "new_tokens": [WORD], "max_length": 64,
    }  # fmt: skip
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    assert call(monkeypatch, "preview", tmp_path / "job.yaml", "--rows", "1") == 0
    told = capsys.readouterr().out
    assert f"⟦«{WORD}»。«<|endoftext|>»⟧" in told
    assert "into 1 rows of max_length 64" in told
    assert "if the base model's architecture can keep them apart" in told


def test_preview_shows_what_sft_learns(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tiny_dir)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(SFT))
    assert call(monkeypatch, "preview", tmp_path / "job.yaml") == 0
    told = capsys.readouterr().out
    assert "row 3 of 48, chat" in told
    assert "packed" not in told
