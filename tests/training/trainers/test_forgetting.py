"""Forgetting: the loss on general_files before and after, for all products and for resumed runs."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters import AdapterRef, AdapterStore, Manifest
from tests.training.jobs import LoadJob, load_job, run_job
from training.data import read_documents
from training.errors import DataError
from training.runs.events import Checkpoint, Evaluation, Event, EventLog, read_events
from training.runs.execute import begin, carry_out
from training.tokens.documents import encode_document
from training.tokens.loss_mask import encode
from training.trainers.forgetting import Forgetting, mean_loss

GENERAL = {"general_files": ["general.jsonl"]}
TEXTS = ["Flour, water, salt and yeast make bread.", "水在一百摄氏度沸腾。" * 40]


@pytest.fixture(scope="module", autouse=True)
def _general(tiny_dir: Path) -> None:
    """Three chats, one with two turns, and two texts, one longer than max_length."""
    lines = (tiny_dir / "plain.jsonl").read_text().splitlines()
    chats = [json.loads(line)["messages"] for line in lines[1:8:3]]
    rows = [{"messages": chats[0] + chats[1]}, {"messages": chats[2]}, *({"text": text} for text in TEXTS)]
    (tiny_dir / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def naive_loss(model: Any, data_dir: Path, max_length: int, file: str = "general.jsonl") -> float:
    """Return the mean over all tokens that count, row by row, without padding."""
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "models/tiny")
    losses = []
    for row in map(json.loads, (data_dir / file).read_text().splitlines()):
        if "messages" in row:
            encoded = encode(tokenizer, row["messages"])
            ids, mask = encoded.input_ids[:max_length], encoded.loss_mask[:max_length]
        else:
            ids = encode_document(row, tokenizer)[:max_length]
            mask = [1] * len(ids)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        counts = torch.tensor(mask[1:]).bool()
        losses.append(cross_entropy(logits[counts], torch.tensor(ids[1:])[counts], reduction="none"))
    return float(torch.cat(losses).mean())


def base_loss(data_dir: Path, max_length: int = 256) -> float:
    return naive_loss(AutoModelForCausalLM.from_pretrained(data_dir / "models/tiny"), data_dir, max_length)


def made(config: Any, data_dir: Path) -> Manifest:
    return AdapterStore(data_dir / "store").get(AdapterRef.parse(run_job(config, data_dir).ref))


def measured(data_dir: Path) -> list[tuple[int, float]]:
    (path,) = data_dir.glob("runs/*/events.jsonl")
    evaluations = [event for event in read_events(path) if isinstance(event, Evaluation)]
    return [(e.step, e.metrics["general_loss"]) for e in evaluations if "general_loss" in e.metrics]


def test_the_manifest_has_the_losses_of_base_and_adapter(
    load_sft: LoadJob, tiny_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "training")
    manifest = made(load_sft(**GENERAL), tmp_path)
    before, after = manifest.metrics["general_loss_before"], manifest.metrics["general_loss"]
    assert before == pytest.approx(base_loss(tiny_dir), rel=1e-5)
    model = AutoModelForCausalLM.from_pretrained(tiny_dir / "models/tiny")
    adapted = PeftModel.from_pretrained(model, tmp_path / "store/doctor/revisions" / manifest.revision)
    assert after == pytest.approx(naive_loss(adapted, tiny_dir, 256), rel=1e-5)
    assert measured(tmp_path) == [(0, before), (4, after)]
    assert "general.jsonl" in manifest.data_digests
    (logged,) = [
        message for message in caplog.messages if message.startswith("the loss on general_files went")
    ]
    assert f"from {before:.3f} to {after:.3f} nats per token ({100 * (after / before - 1):+.1f} %)" in logged


def test_measuring_does_not_change_training(load_sft: LoadJob, tmp_path: Path) -> None:
    changes = {"lora": {"r": 4, "lora_dropout": 0.2}, "max_steps": 3}
    assert (
        made(load_sft(**changes), tmp_path / "without").revision
        == made(load_sft(**changes, **GENERAL), tmp_path / "with").revision
    )


@pytest.mark.parametrize("rise", [1.05, 1.2])
def test_much_forgetting_logs_a_warning(
    rise: float,
    load_sft: LoadJob,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = iter([2.0, 2.0 * rise])
    monkeypatch.setattr("training.trainers.forgetting.mean_loss", lambda *_: next(found))
    made(load_sft(**GENERAL), tmp_path)
    warned = [
        r.getMessage() for r in caplog.records if "forgets" in r.getMessage() and r.levelname == "WARNING"
    ]
    assert len(warned) == (rise > 1.1)


def test_batch_size_does_not_change_the_loss(
    load_sft: LoadJob, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_sft(**GENERAL)
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir / "models/tiny")
    model = AutoModelForCausalLM.from_pretrained(tiny_dir / "models/tiny")
    examples = Forgetting(read_documents(config.general_files), tokenizer, config, None, None)._examples  # type: ignore[arg-type]
    naive = pytest.approx(base_loss(tiny_dir), rel=1e-5)
    assert [mean_loss(model, examples, size, "x") for size in (1, 3, 8)] == [naive] * 3
    vocabulary = model.config.vocab_size
    monkeypatch.setattr("training.trainers.forgetting.LOGITS_AT_ONCE", 7 * vocabulary)
    monkeypatch.setattr("training.trainers.forgetting.LOGITS", 100 * vocabulary)
    assert mean_loss(model, examples, 8, "x") == naive


@pytest.mark.parametrize("moment", [Evaluation, Checkpoint])
def test_a_resumed_run_keeps_the_loss_before_training(
    moment: type[Event], load_sft: LoadJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill the run between the two evaluations before the first step, or later."""
    config = load_sft(**GENERAL, checkpoint_every=2)
    whole = made(config, tmp_path / "whole")

    class Killed(BaseException): ...

    def write(self: EventLog, event: Event) -> None:
        real(self, event)
        if isinstance(event, moment):
            raise Killed

    real = EventLog.write
    run_id = begin(config, tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(EventLog, "write", write)
        with pytest.raises(Killed):
            carry_out(run_id, tmp_path / "killed")
    carry_out(run_id, tmp_path / "killed")
    resumed = AdapterStore(tmp_path / "killed/store").get(AdapterRef.parse("doctor@canary"))
    for name in ("eval_loss_before", "eval_loss", "general_loss_before", "general_loss"):
        assert resumed.metrics[name] == whole.metrics[name]
    assert measured(tmp_path / "killed") == measured(tmp_path / "whole")


def test_the_loss_before_training_is_that_of_the_parent_adapter(
    load_sft: LoadJob, tiny_dir: Path, tmp_path: Path
) -> None:
    first = made(load_sft(**GENERAL), tmp_path)
    config = load_sft(**GENERAL, name="further", adapter="doctor@canary", max_steps=1)
    assert made(config, tmp_path).metrics["general_loss_before"] == pytest.approx(
        first.metrics["general_loss"], rel=1e-5
    )


def test_a_quantised_base_is_measured_quantised(load_sft: LoadJob, tiny_dir: Path, tmp_path: Path) -> None:
    metrics = made(load_sft(**GENERAL, quantization="4bit", max_steps=1), tmp_path).metrics
    before = metrics["general_loss_before"]
    assert before == pytest.approx(base_loss(tiny_dir), rel=0.1)
    assert before != pytest.approx(base_loss(tiny_dir), rel=1e-5)
    assert metrics["general_loss"] != before


@pytest.mark.parametrize("how", [{"full": True, "learning_rate": 1e-3}, {"merge": True}])
def test_a_new_base_model_has_the_losses_too(how: dict[str, Any], tiny_dir: Path, tmp_path: Path) -> None:
    (tiny_dir / "texts.txt").write_text("Fever is a sign.\nRest helps.\nCough may last.\nDrink water.\n")
    job = {"stage": "pt", "name": "reader", "base_model": "models/tiny", "train_files": ["texts.txt"]}
    job |= {"max_steps": 2, "max_length": 64, "batch_size": 2, "threads": 1}
    run_job(load_job(tiny_dir, job, **GENERAL, **how), tmp_path)
    metrics = json.loads((tmp_path / "models/reader/provenance.json").read_text())["metrics"]
    assert metrics["general_loss_before"] == pytest.approx(base_loss(tiny_dir, 64), rel=1e-5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "models/reader")
    assert metrics["general_loss"] == pytest.approx(naive_loss(model, tiny_dir, 64), rel=1e-4)


def test_rows_without_a_token_that_counts_are_reported(
    load_sft: LoadJob, tiny_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Why? " * 80}, {"role": "assistant", "content": "So."}]}
    ]
    (tiny_dir / "long.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(
        DataError, match="no row of general_files has a token that counts within max_length 64"
    ):
        run_job(load_sft(general_files=["long.jsonl"], max_length=64), tmp_path)
    made(load_sft(general_files=["long.jsonl", "general.jsonl"], max_length=64, max_steps=1), tmp_path)
    assert "skipped 1 of 5 rows of general_files: no token counts within max_length 64" in caplog.messages
