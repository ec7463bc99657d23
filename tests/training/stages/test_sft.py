import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters import AdapterRef, AdapterStore, GoldenPrompt, Manifest, Rounding, fingerprint, read_golden
from tests.training.jobs import SFT, LoadJob, load_job, run_job
from training.artifacts import result as product
from training.errors import ConfigError, DataError
from training.models.golden import rounding
from training.runs.events import (
    Checkpoint,
    Evaluation,
    Failed,
    Progress,
    Published,
    Started,
    Succeeded,
    read_events,
)
from training.runs.execute import begin
from training.stages import sft


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def without_marks(base: Path, target: Path) -> Path:
    """Copy a base model, with a chat template that does not mark answers, like most."""
    target.mkdir(parents=True)
    for file in base.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    template = (base / "chat_template.jinja").read_text()
    template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    (target / "chat_template.jinja").write_text(template)
    return target


class Run:
    """A finished run of the stage with its trainer."""

    def __init__(self, config: Any, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def spy(**kwargs: Any) -> Any:
            self.trainer = trl_trainer(**kwargs)
            return self.trainer

        trl_trainer = sft.SupervisedTrainer

        def look(model: Any, golden: list[GoldenPrompt]) -> Rounding | None:
            self.weights = {name: weight.clone() for name, weight in model.state_dict().items()}
            return rounding(model, golden)  # which rounds the weights in place

        monkeypatch.setattr(sft, "SupervisedTrainer", spy)
        monkeypatch.setattr(product, "rounding", look)
        self.published = run_job(config, data_dir)
        (self.folder,) = (data_dir / "runs").iterdir()
        self.events = read_events(self.folder / "events.jsonl")
        self.store = AdapterStore(data_dir / "store")

    def learnt(self) -> list[str]:
        """Return the text with a loss, row by row, in the trainer's batches."""
        tokenizer = self.trainer.processing_class
        return [
            tokenizer.decode([token for token in row if token != -100])
            for batch in self.trainer.get_train_dataloader()
            for row in batch["labels"].tolist()
        ]


@pytest.fixture(scope="module")
def base(tiny_dir: Path) -> Path:
    return tiny_dir / "models" / "tiny"


@pytest.fixture(scope="module")
def run(tiny_dir: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    before = digests(base)
    with pytest.MonkeyPatch.context() as monkeypatch:
        run = Run(load_job(tiny_dir, SFT), tmp_path_factory.mktemp("sft"), monkeypatch)
    assert digests(base) == before, "training changed the base's files"
    return run


@pytest.fixture(scope="module")
def manifest(run: Run) -> Manifest:
    return run.store.get(AdapterRef.parse("doctor@canary"))


def test_the_adapter_is_published_under_the_alias(run: Run, manifest: Manifest, base: Path) -> None:
    assert run.published.ref == f"doctor@{manifest.revision}"
    assert run.published.alias == "canary"
    assert run.store.aliases("doctor") == {"canary": manifest.revision}
    assert manifest.stage == "sft"
    assert manifest.base_model == "tiny"
    assert manifest.base_fingerprint == fingerprint(base)
    assert manifest.run_id == run.folder.name
    assert manifest.dtype == "float32"
    assert manifest.licence == "CC0-1.0"
    assert manifest.golden_prompts == 8
    assert set(manifest.data_digests) == {"doctor.jsonl", "heldout.jsonl"}
    assert manifest.metrics["eval_loss"] < manifest.metrics["eval_loss_before"]


def test_no_file_of_a_revision_contains_host_paths(run: Run, manifest: Manifest, tiny_dir: Path) -> None:
    for file in run.store.folder("doctor", manifest.revision).iterdir():
        assert str(tiny_dir).encode() not in file.read_bytes()


def test_every_tensor_of_the_adapter_was_trained(run: Run) -> None:
    tensors = load_file(run.folder / "result" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7  # A and B, two layers, seven linear layers in each
    assert all(value.abs().max() > 0 for name, value in tensors.items() if "lora_B" in name)


def test_the_base_inside_the_trainer_is_untouched(run: Run, base: Path) -> None:
    trained = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in run.weights.items()
        if "lora_" not in name
    }
    original = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert trained.keys() == original.keys()
    assert all(torch.equal(trained[name], value) for name, value in original.items())


def test_the_events_of_a_run(run: Run) -> None:
    kinds = [type(event) for event in run.events]
    assert kinds[:2] == [Started, Evaluation]
    assert kinds[-3:] == [Evaluation, Published, Succeeded]
    assert {Progress, Checkpoint} <= set(kinds)
    progress = [event for event in run.events if isinstance(event, Progress)]
    assert [(event.step, event.max_steps) for event in progress] == [(step, 4) for step in (1, 2, 3, 4)]
    assert progress[0].eta_seconds > 0
    checkpoints = [event for event in run.events if isinstance(event, Checkpoint)]
    assert (run.folder / checkpoints[-1].folder / "trainer_state.json").exists()


def test_the_files_of_a_run_folder(run: Run) -> None:
    assert {file.name for file in run.folder.iterdir()} == {
        ".lock", "config.yaml", "inputs.json", "events.jsonl", "tensorboard", "checkpoints", "result",
    }  # fmt: skip
    assert not (run.folder / "checkpoints" / "runs").exists(), "a second board"
    assert len(list((run.folder / "tensorboard").iterdir())) == 1


def test_the_golden_answers_are_those_of_the_published_files(
    run: Run, manifest: Manifest, base: Path
) -> None:
    folder = run.store.folder("doctor", manifest.revision)
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(base)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    for prompt in read_golden(folder / "golden.jsonl"):
        assert prompt.prompt_token_ids == tokenizer.apply_chat_template(
            prompt.messages, add_generation_prompt=True, return_dict=False
        )
        tokens = torch.tensor([prompt.prompt_token_ids + prompt.token_ids])
        at = slice(len(prompt.prompt_token_ids) - 1, -1)
        for model, expected in ((adapted, prompt.logprobs), (plain, prompt.base_logprobs)):
            with torch.inference_mode():
                scores = torch.log_softmax(model(tokens).logits[0, at], -1)
            found = scores[range(len(prompt.token_ids)), prompt.token_ids]
            torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=0)
            if model is adapted:
                assert scores.argmax(-1).tolist() == prompt.token_ids


def test_the_loss_is_on_the_answers_alone(run: Run, tiny_dir: Path) -> None:
    rows = [json.loads(line) for line in (tiny_dir / "doctor.jsonl").read_text().splitlines()]
    answers = [row["messages"][-1]["content"] + "<|im_end|>" for row in rows]
    assert sorted(run.learnt()) == sorted(answers)


def chat(*contents: str) -> str:
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
    return json.dumps({"messages": messages}) + "\n"


@pytest.mark.parametrize("is_marked", [True, False])
def test_the_loss_covers_the_answers_of_all_turns(
    load_sft: LoadJob, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_marked: bool
) -> None:
    data = tmp_path / "turns.jsonl"
    data.write_text(chat("be kind", "one", "first", "two", "second") * 3)
    model = base if is_marked else without_marks(base, tmp_path / "plain-base")
    config = load_sft(base_model=str(model), train_files=[str(data)], evaluation_files=[], max_steps=2)
    run = Run(config, tmp_path / "data", monkeypatch)
    assert run.learnt() == ["first<|im_end|>second<|im_end|>"] * 3
    assert read_golden(run.folder / "result" / "golden.jsonl")[0].messages[0]["role"] == "system"


def test_the_same_config_makes_the_same_adapter(load_sft: LoadJob, run: Run, tmp_path: Path) -> None:
    assert run_job(load_sft(), tmp_path).ref == run.published.ref


def test_cut_and_skipped_rows_are_logged(
    load_sft: LoadJob, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text(
        chat("s", "q", "a", "q", "answer " * 50)
        + json.dumps({"instruction": "long " * 50, "output": "never seen"}) + "\n"
        + json.dumps({"instruction": "q", "output": "short"}) + "\n"
    )  # fmt: skip
    run_job(load_sft(train_files=[str(data)], evaluation_files=[], max_steps=2, max_length=40), tmp_path)
    assert "cut 2 of 3 rows at max_length 40" in caplog.text
    assert "skipped 1 of 3 rows: max_length cuts off the whole answer" in caplog.text


@pytest.mark.parametrize("problem", ["no template", "not on the hub", "bad rows"])
def test_a_run_that_cannot_start_fails_and_publishes_nothing(
    load_sft: LoadJob, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    expected: type[Exception]
    if problem == "no template":
        config = load_sft(base_model=str(without_marks(base, tmp_path / "mute")))
        (tmp_path / "mute" / "chat_template.jinja").unlink()
        expected, reason = ConfigError, "base_model: mute has no chat template"
    elif problem == "not on the hub":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        config = load_sft(base_model="nobody/nothing")
        expected, reason = ConfigError, "base_model: nobody/nothing is not a folder here"
    else:
        (tmp_path / "bad.jsonl").write_text("{}\n")
        config = load_sft(train_files=[str(tmp_path / "bad.jsonl")])
        expected, reason = DataError, r"bad\.jsonl:1: found nothing"
    with pytest.raises(expected, match=reason):
        run_job(config, tmp_path / "data")
    (path,) = (tmp_path / "data" / "runs").glob("*/events.jsonl")
    last = read_events(path)[-1]
    assert isinstance(last, Failed)
    assert expected.__name__ in last.error
    assert "Traceback" in last.traceback
    assert not (tmp_path / "data" / "store").exists()


# Packing, noise, memory, merging


def test_packed_rows_are_whole_conversations(
    load_sft: LoadJob, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = Run(load_sft(packing=True), tmp_path, monkeypatch)
    assert sorted("".join(packed.learnt())) == sorted("".join(run.learnt())), "no word is lost"
    assert len(packed.learnt()) < len(run.learnt()) / 2
    batch = next(iter(packed.trainer.get_train_dataloader()))
    assert "attention_mask" not in batch
    assert (batch["position_ids"] == 0).sum() > 2
    before, after = (
        [event.metrics["eval_loss"] for event in each.events if isinstance(event, Evaluation)]
        for each in (run, packed)
    )
    assert before[0] == pytest.approx(after[0], rel=1e-5), "evaluation is the same, packed or not"


def test_noise_is_added_in_training_only(
    load_sft: LoadJob, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy = Run(load_sft(neftune_noise_alpha=5.0), tmp_path, monkeypatch)
    assert noisy.published.ref != run.published.ref
    assert noisy.events[1].metrics == pytest.approx(run.events[1].metrics), "measured without noise"
    embeddings = noisy.trainer.model.get_input_embeddings()
    assert not embeddings._forward_hooks, "golden answers are without noise"


def test_accumulated_batches_learn_what_one_large_batch_does(
    load_sft: LoadJob, tiny_dir: Path, tmp_path: Path
) -> None:
    """All tokens of a step have the same weight, however it is split into batches; here a step has all rows."""
    data, adapters = tmp_path / "eight.jsonl", []
    lines = (tiny_dir / SFT["train_files"][0]).read_text(encoding="utf-8").splitlines()[:8]
    data.write_text("\n".join(lines), encoding="utf-8")
    for size, steps in ((8, 1), (2, 4)):
        data_dir = tmp_path / str(size)
        settings = {"batch_size": size, "gradient_accumulation_steps": steps, "train_files": [str(data)]}
        run_job(load_sft(**settings, evaluation_files=[]), data_dir)
        (file,) = data_dir.glob("runs/*/result/adapter_model.safetensors")
        adapters.append(load_file(file))
    one, many = adapters
    assert all(torch.allclose(many[name], weight, atol=2e-3) for name, weight in one.items())


def test_gradient_checkpointing_changes_nothing(load_sft: LoadJob, run: Run, tmp_path: Path) -> None:
    assert run_job(load_sft(gradient_checkpointing=True), tmp_path).ref == run.published.ref


def test_golden_answers_are_those_of_the_unquantised_base(
    load_sft: LoadJob, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(load_sft(quantization="4bit"), tmp_path, monkeypatch)
    assert next(run.trainer.model.parameters(), None) is None, "the quantised model's memory is free"
    tensors = load_file(run.folder / "result" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}, "and so it is after resuming"
    manifest = run.store.get(AdapterRef.parse("doctor@canary"))
    assert manifest.dtype == "float32"
    assert manifest.metrics["eval_loss"] < manifest.metrics["eval_loss_before"]
    test_the_golden_answers_are_those_of_the_published_files(run, manifest, base)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": {"use_dora": True, "modules_to_save": ["lm_head"]}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "quantization": "4bit"},
    ],
    ids=["lora", "dora and a whole module", "stretched and quantised"],
)
def test_a_merged_result_is_a_base_equal_to_the_adapter(
    load_sft: LoadJob, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    ids = torch.arange(3, 60)[None]
    seen: list[torch.Tensor] = []
    write = sft.write_result

    def spy(model: Any, *rest: Any, **more: Any) -> Path:
        with torch.no_grad():
            seen.append(model.eval()(input_ids=ids).logits)
        return write(model, *rest, **more)

    monkeypatch.setattr(sft, "write_result", spy)
    config = load_sft(merge=True, golden={}, publish={}, **changes)
    run = Run(config, tmp_path, monkeypatch)
    assert (run.published.ref, run.published.alias) == ("models/doctor", None)
    assert not (tmp_path / "store").exists()
    made = tmp_path / "models" / "doctor"
    merged = AutoModelForCausalLM.from_pretrained(made)
    with torch.no_grad():
        found, before = merged(ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits
    far = float((seen[0] - before).abs().max())
    assert float((found - seen[0]).abs().max()) < (0.5 * far if "quantization" in changes else 1e-4)
    assert far > 0.1
    assert (
        AutoTokenizer.from_pretrained(made).chat_template == AutoTokenizer.from_pretrained(base).chat_template
    )
    scaled = merged.config.rope_parameters["rope_type"] == "linear"
    assert scaled == ("rope_scaling" in changes)
    with pytest.raises(ConfigError, match=r"there is a base model .*doctor already"):
        begin(config, tmp_path)
