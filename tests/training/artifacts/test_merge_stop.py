"""Stops of a model with merged adapters that have stop strings."""

import json
import logging
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from adapters import AdapterStore
from tests.training.artifacts.test_merge import trained
from training.artifacts.merge import merge

TOKEN, TEXT = "<|endoftext|>", "### 问题:"


def stopping(base: Path, folder: Path, *stop: str, template: bool = False) -> str:
    """Write an adapter folder with these stop strings."""
    trained(base, folder, seed=1)
    provenance = folder / "provenance.json"
    provenance.write_text(json.dumps({**json.loads(provenance.read_text()), "stop": stop}))
    if template:
        (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return str(folder)


def stop_tokens(folder: Path) -> list[str]:
    ids = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    found: list[str] = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(
        ids if isinstance(ids, list) else [ids]
    )
    return found


@pytest.fixture
def base(tiny_dir: Path) -> Path:
    return tiny_dir / "models" / "tiny"


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


def test_stop_tokens_become_the_models_own_and_strings_are_logged(
    base: Path, store: AdapterStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = stopping(base, tmp_path / "doctor", TOKEN, TEXT, template=True)
    with caplog.at_level(logging.WARNING, "training.artifacts.merge"):
        merge(str(base), [adapter], tmp_path / "merged", store)
    assert stop_tokens(tmp_path / "merged") == list(dict.fromkeys([*stop_tokens(base), TOKEN]))
    (logged,) = caplog.messages
    assert logged.startswith(f"a base model cannot store stop strings, here {TEXT!r}: send them as `stop`")


def test_the_stops_are_those_of_the_last_template(
    base: Path, store: AdapterStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = stopping(base, tmp_path / "first", TEXT, template=True)
    second = stopping(base, tmp_path / "second", template=True)
    third = stopping(base, tmp_path / "third")
    merge(str(base), [first, second, third], tmp_path / "merged", store)
    assert stop_tokens(tmp_path / "merged") == stop_tokens(base)
    assert not [message for message in caplog.messages if "stop strings" in message]
