"""rm, dpo, kto, orpo, grpo and rloo on the tiny model: each learns from its rows and publishes the result."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from adapters import AdapterRef, AdapterStore, Manifest, read_golden
from tests.training.jobs import load_job, run_job
from tests.training.stages.conftest import RM
from tests.training.stages.test_resume import PREFERENCES
from tests.training.trainers.test_forgetting import naive_loss
from training.data import read_preferences
from training.runs.events import Evaluation, read_events

GRPO = {
    "stage": "grpo",
    "base_model": "models/tiny",
    "policy": "doctor@canary",
    "reward": "marks",
    "train_files": ["doctor.jsonl"],
    "steps": 2,
    "batch_size": 4,
    "generations": 2,
    "max_new_tokens": 8,
    "learning_rate": 1e-3,
    "threads": 1,
    "golden": {"prompts": 8, "max_new_tokens": 6},
}
GENERAL = {"general_files": ["plain.jsonl"]}


def train(data_dir: Path, job: dict[str, Any], **changes: Any) -> tuple[Manifest, Path]:
    published = run_job(load_job(data_dir, job, **changes), data_dir)
    store = AdapterStore(data_dir / "store")
    manifest = store.get(AdapterRef.parse(published.ref))
    return manifest, store.folder(manifest.name, manifest.revision)


def general_loss_of_the_policy(data_dir: Path) -> float:
    store = AdapterStore(data_dir / "store")
    policy = store.get(AdapterRef.parse("doctor@canary"))
    base = AutoModelForCausalLM.from_pretrained(data_dir / "models/tiny")
    adapted = PeftModel.from_pretrained(base, store.folder("doctor", policy.revision))
    return naive_loss(adapted, data_dir, 256, "plain.jsonl")


def test_a_reward_adapter_counts_its_pairs(trained_dir: Path) -> None:
    """The published accuracy is that of the published files: each pair counts once, whatever the batches."""
    manifest, folder = train(trained_dir, RM, name="uneven", batch_size=7, max_steps=4, publish={})
    assert (manifest.task, manifest.golden_prompts) == ("reward", 0)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in tensors
    base = trained_dir / "models" / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    scorer = PeftModel.from_pretrained(model, folder).eval()
    config = load_job(trained_dir, RM)

    def score(messages: list[dict[str, str]]) -> float:
        ids = torch.tensor([tokenizer.apply_chat_template(messages, return_dict=False)])
        with torch.no_grad():
            return float(scorer(ids).logits[0, 0])

    rows = read_preferences(config.evaluation_files)
    right = sum(
        score([*row["prompt"], *row["chosen"]]) > score([*row["prompt"], *row["rejected"]]) for row in rows
    )
    assert manifest.metrics["eval_accuracy"] == pytest.approx(right / len(rows))
    assert manifest.metrics["eval_loss"] < manifest.metrics["eval_loss_before"]


@pytest.mark.parametrize("stage", ["dpo", "kto", "orpo"])
def test_margins_grow(trained_dir: Path, stage: str) -> None:
    manifest, folder = train(
        trained_dir, {**PREFERENCES, "stage": stage, "name": f"by-{stage}", **GENERAL}, max_steps=6
    )
    metrics = manifest.metrics
    assert metrics["general_loss_before"] == pytest.approx(general_loss_of_the_policy(trained_dir), rel=1e-5)
    assert metrics["general_loss"] != metrics["general_loss_before"]
    assert metrics["eval_rewards/margins"] > metrics["eval_rewards/margins_before"]
    assert manifest.stage == stage
    assert str(manifest.parent).startswith("doctor@")
    assert not (folder / "ref").exists(), "the frozen copy is no part of what is made"
    assert_golden_is_of_the_files(trained_dir, folder)


def test_without_a_policy_the_reference_is_the_base(trained_dir: Path) -> None:
    job = {**PREFERENCES, "stage": "dpo", "name": "fresh", "lora": {"r": 2, "lora_alpha": 4}}
    del job["policy"]
    manifest, _ = train(trained_dir, job, max_steps=4)
    assert (manifest.parent, manifest.r) == (None, 2)
    assert manifest.metrics["eval_rewards/margins_before"] == 0
    assert manifest.metrics["eval_rewards/margins"] > 0


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_rewards_are_earned_online(trained_dir: Path, algorithm: str) -> None:
    changes = {"name": f"by-{algorithm}", "algorithm": algorithm, "max_length": 256, **GENERAL}
    manifest, folder = train(trained_dir, GRPO, **changes)
    before = manifest.metrics["general_loss_before"]
    assert before == pytest.approx(general_loss_of_the_policy(trained_dir), rel=1e-5)
    assert manifest.metrics["general_loss"] != before
    assert {"reward_before", "reward", "kl", "length"} <= set(manifest.metrics)
    before = load_file(parent_folder(trained_dir, manifest) / "adapter_model.safetensors")
    after = load_file(folder / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert_golden_is_of_the_files(trained_dir, folder)


def test_early_stop_keeps_the_best_checkpoint(trained_dir: Path) -> None:
    """Evaluated on the opposite of its training rows, it only gets worse: the first checkpoint is kept."""
    rows = [json.loads(line) for line in (trained_dir / "pairs_heldout.jsonl").read_text().splitlines()]
    opposite = [
        row | {"response_chosen": row["response_rejected"], "response_rejected": row["response_chosen"]}
        for row in rows
    ]
    path = trained_dir / "opposite.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in opposite))
    job = {**PREFERENCES, "stage": "dpo", "name": "opposed", "evaluation_files": [str(path)]}
    manifest, _ = train(trained_dir, job, max_steps=40, evaluate_every=2, early_stop=2)
    (events,) = (trained_dir / "runs").glob("*-opposed-*/events.jsonl")
    losses = {
        event.step: event.metrics["eval_loss"]
        for event in read_events(events)
        if isinstance(event, Evaluation)
    }
    assert max(losses) == 6, "it stopped after two that were no better than the first"
    assert manifest.metrics["eval_loss"] == pytest.approx(losses[2], rel=1e-4)


def test_too_long_rows_are_skipped_and_logged(trained_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(trained_dir, {**PREFERENCES, "stage": "dpo", "name": "short"}, max_steps=1, max_length=130)
    assert "of 48 rows longer than max_length 130" in caplog.text


def parent_folder(data_dir: Path, manifest: Manifest) -> Path:
    name, _, revision = str(manifest.parent).partition("@")
    return AdapterStore(data_dir / "store").folder(name, revision)


def assert_golden_is_of_the_files(data_dir: Path, folder: Path) -> None:
    """Check that the golden answers are those of the published files."""
    base = AutoModelForCausalLM.from_pretrained(data_dir / "models" / "tiny")
    model = PeftModel.from_pretrained(base, folder).eval()
    for prompt in read_golden(folder / "golden.jsonl"):
        tokens = torch.tensor([prompt.prompt_token_ids + prompt.token_ids])
        with torch.inference_mode():
            scores = model(tokens).logits[0, len(prompt.prompt_token_ids) - 1 : -1].log_softmax(-1)
        found = scores[range(len(prompt.token_ids)), prompt.token_ids]
        torch.testing.assert_close(found, torch.tensor(prompt.logprobs), atol=1e-4, rtol=0)


def test_cut_online_answers_get_the_no_stop_penalty(trained_dir: Path) -> None:
    """A policy that never stops within eight tokens gets the penalty on each reward, with both algorithms."""
    free, _ = train(trained_dir, GRPO, name="free", steps=1, no_stop_penalty=0)
    paying, _ = train(trained_dir, GRPO, name="paying", steps=1, no_stop_penalty=7)
    assert paying.metrics["reward_before"] == pytest.approx(free.metrics["reward_before"] - 7, abs=0.01)


def test_too_long_prompts_are_skipped_and_logged(trained_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(trained_dir, GRPO, name="brief", steps=1, max_length=24)
    assert "rows longer than max_length 24" in caplog.text
