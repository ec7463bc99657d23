import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters import fingerprint
from tests.training.jobs import LoadJob, run_job
from training.errors import ConfigError
from training.runs.events import Progress, Started, Succeeded, read_events
from training.stages.scratch import _batches


@pytest.fixture(scope="module")
def base(tiny_dir: Path) -> Path:
    return tiny_dir / "models" / "tiny"


def test_the_result_is_a_hugging_face_model_folder(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.config.model_type == "qwen3"
    assert model.config.head_dim == 32
    assert model.dtype == torch.float32
    assert len(tokenizer) <= model.config.vocab_size == 512
    assert len(fingerprint(base)) == 16


def test_generation_stops_at_the_end_of_a_turn(base: Path) -> None:
    stop = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<|im_end|>")
    assert json.loads((base / "generation_config.json").read_text())["eos_token_id"] == stop


@pytest.mark.parametrize("text", ["感冒有什么症状？", "What are the signs?\n- 37.3 °C", "\t 🙂 混合 text"])
def test_the_tokenizer_round_trips_any_text(base: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokens_are_short(base: Path) -> None:
    vocabulary = AutoTokenizer.from_pretrained(base).get_vocab()
    assert max(len(token) for token in vocabulary if not token.startswith("<|")) <= 12


def test_every_user_can_read_a_published_base(base: Path) -> None:
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in base.iterdir())


def test_the_run_writes_events_and_the_loss_falls(tiny_dir: Path) -> None:
    (path,) = tiny_dir.glob("runs/*-tiny-*/events.jsonl")
    events = read_events(path)
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Succeeded)
    losses = [event.metrics["loss"] for event in events if isinstance(event, Progress)]
    assert losses[-1] < losses[0]
    assert list((path.parent / "tensorboard").iterdir())


def test_the_same_config_makes_the_same_tensors(load_base: LoadJob, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run_job(load_base(name=name), tmp_path)
    one, two = (tmp_path / "models" / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    run_job(load_base(name="other", seed=1), tmp_path)
    assert (tmp_path / "models" / "other" / "model.safetensors").read_bytes() != one.read_bytes()


def test_a_base_model_is_never_overwritten(load_base: LoadJob, tiny_dir: Path) -> None:
    runs = len(list((tiny_dir / "runs").iterdir()))
    with pytest.raises(ConfigError, match=r"name: there is a base model .*tiny already"):
        run_job(load_base(), tiny_dir)
    assert len(list((tiny_dir / "runs").iterdir())) == runs


def test_leftovers_of_a_killed_run_are_removed(load_base: LoadJob, tmp_path: Path) -> None:
    partial = tmp_path / "models" / ".again.partial"
    partial.mkdir(parents=True)
    (partial / "half").touch()
    run_job(load_base(name="again", steps=1), tmp_path)
    assert not partial.exists()
    assert not (tmp_path / "models" / "again" / "half").exists()


def test_batches_have_whole_documents_with_a_label_on_every_token() -> None:
    documents = [[n] * (n % 7 + 1) for n in range(1, 41)]
    batches = _batches(documents, size=4, seed=0)
    seen = []
    for batch in (next(batches) for _ in range(10)):
        parts = (batch[key].tolist() for key in ("input_ids", "attention_mask", "labels"))
        for tokens, mask, labels in zip(*parts, strict=True):
            length = sum(mask)
            seen.append(tokens[:length])
            assert labels == tokens[:length] + [-100] * (len(labels) - length)
            assert not any(tokens[length:])
    assert sorted(seen) == sorted(documents)
