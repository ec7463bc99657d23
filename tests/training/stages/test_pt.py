"""Continued pre-training on the tiny model: of an adapter, of all weights, with new words, packed and not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from adapters import AdapterRef, AdapterStore, fingerprint, read_golden
from tests.training.jobs import load_job, run_job
from training.config.fields import OnError
from training.demo.facts import conditions
from training.errors import ConfigError
from training.runs.execute import begin
from training.stages import pt
from training.tokens import packing

PT = {
    "stage": "pt",
    "name": "reader",
    "base_model": "models/tiny",
    "train_files": ["texts.jsonl"],
    "evaluation_files": ["texts_heldout.txt"],
    "learning_rate": 0.01,
    "max_steps": 4,
    "max_length": 64,
    "batch_size": 4,
    "threads": 1,
    "golden": {"prompts": 8, "max_new_tokens": 6},
    "publish": {"alias": "default"},
}
BASE_OF_IT = {"golden": {}, "publish": {}}
WORD = "肾上腺素"


class Run:
    """A finished run of the stage with its trainer."""

    def __init__(self, config: Any, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def spy(**kwargs: Any) -> Any:
            self.trainer = trl_trainer(**kwargs)
            return self.trainer

        trl_trainer = pt.SupervisedTrainer
        monkeypatch.setattr(pt, "SupervisedTrainer", spy)
        self.published = run_job(config, data_dir)
        (self.folder,) = (data_dir / "runs").iterdir()
        self.made = data_dir / self.published.ref

    @property
    def batches(self) -> list[dict[str, torch.Tensor]]:
        return list(self.trainer.get_train_dataloader())


@pytest.fixture(scope="module")
def load(tiny_dir: Path) -> Callable[..., Any]:
    facts = [one.zh for one in conditions()[:14]]
    texts = [f"{one.name}：{one.symptoms}。{WORD}，{one.red_flag}。{one.prevention}。" * 2 for one in facts]
    rows = [{"text": text} for text in texts[:10]]
    chat = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in [*rows, chat]]
    (tiny_dir / "texts.jsonl").write_text("".join(lines))
    (tiny_dir / "texts_heldout.txt").write_text("\n\n".join(texts[10:]))
    return lambda **changes: load_job(tiny_dir, PT, **changes)


@pytest.fixture
def base(tiny_dir: Path) -> Path:
    return tiny_dir / "models" / "tiny"


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    ids = tokenizer(f"感冒的常见症状，{WORD}", return_tensors="pt").input_ids
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids.to(model.device)).logits
    return found


def test_an_adapter_is_published_with_its_proof(
    load: Callable[..., Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(load(), tmp_path, monkeypatch)
    store = AdapterStore(tmp_path / "store")
    manifest = store.get(AdapterRef.parse("reader@default"))
    assert (manifest.stage, manifest.task, manifest.golden_prompts) == ("pt", "chat", 8)
    assert manifest.base_fingerprint == fingerprint(base)
    assert manifest.metrics["eval_loss"] < manifest.metrics["eval_loss_before"]
    folder = store.folder("reader", manifest.revision)
    golden = read_golden(folder / "golden.jsonl")
    assert all([message["role"] for message in prompt.messages] == ["user"] for prompt in golden)
    heldout = (base.parents[1] / "texts_heldout.txt").read_text()
    assert all(prompt.messages[0]["content"] in heldout for prompt in golden)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    prompt = golden[0]
    with torch.no_grad():
        scores = adapted(torch.tensor([prompt.prompt_token_ids + prompt.token_ids])).logits.log_softmax(-1)
    at = range(len(prompt.prompt_token_ids) - 1, len(prompt.prompt_token_ids) + len(prompt.token_ids) - 1)
    assert scores[0, at, prompt.token_ids].tolist() == pytest.approx(prompt.logprobs, abs=1e-4)
    # Packed by default: rows are full, documents end with the end token, and padding has no label.
    tokenizer = AutoTokenizer.from_pretrained(base)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    for batch in run.batches:
        assert "attention_mask" not in batch
        starts = batch["position_ids"] == 0
        assert (batch["labels"][starts] == packing.IGNORED).all()
        assert torch.equal(batch["labels"][~starts], batch["input_ids"][~starts])
        filled = (batch["labels"] != packing.IGNORED).sum() + starts.sum()
        assert filled == batch["input_ids"].numel()
    assert sum(int((batch["labels"] == end).sum()) for batch in run.batches) == 10


def test_without_packing_each_part_of_a_document_is_a_row(
    load: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(load(packing=False, max_steps=1), tmp_path, monkeypatch)
    for batch in run.batches:
        padding = batch["attention_mask"] == 0
        assert (batch["labels"][padding] == packing.IGNORED).all()
        assert torch.equal(batch["labels"][~padding], batch["input_ids"][~padding])


def test_long_documents_are_split_into_parts_of_equal_length(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = "感冒的常见症状是鼻塞、流涕、咽痛。" * 30
    parts = [each["input_ids"] for each in pt._examples([{"text": text}], tokenizer, 50, OnError())]
    lengths = {len(part) for part in parts}
    assert max(lengths) <= 50
    assert max(lengths) - min(lengths) <= 1
    joined = [token for part in parts for token in part]
    assert joined == [*tokenizer(text).input_ids, tokenizer.convert_tokens_to_ids("<|endoftext|>")]


def test_full_training_makes_a_new_base(
    load: Callable[..., Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(full=True, learning_rate=1e-3, new_tokens=[WORD], **BASE_OF_IT)
    run = Run(config, tmp_path, monkeypatch)
    assert run.published.ref == "models/reader"
    assert not (tmp_path / "store").exists()
    tokenizer = AutoTokenizer.from_pretrained(run.made)
    assert len(tokenizer(WORD).input_ids) == 1
    model = AutoModelForCausalLM.from_pretrained(run.made)
    assert model.config.tie_word_embeddings
    assert torch.equal(logits(model, tokenizer), logits(run.trainer.model, tokenizer))
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert not any(torch.equal(weight, before[name]) for name, weight in after.items()), "all were trained"
    assert json.loads((run.made / "provenance.json").read_text())["stage"] == "pt"
    assert GenerationConfig.from_pretrained(run.made).eos_token_id == [
        GenerationConfig.from_pretrained(base).eos_token_id
    ]
    with pytest.raises(ConfigError, match=r"there is a base model .*reader already"):
        begin(config, tmp_path)


def test_new_words_and_the_adapter_are_merged_into_a_new_base(
    load: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    tokens: list[Any] = []
    write = pt.write_result

    def spy(model: Any, base: Any, *rest: Any, **more: Any) -> Path:
        seen.append(logits(model, base.tokenizer))
        tokens.append(base.tokenizer(WORD).input_ids)
        learnt = {name for name, weight in model.named_parameters() if weight.requires_grad}
        assert any("embed_tokens.modules_to_save" in name for name in learnt)
        return write(model, base, *rest, **more)

    monkeypatch.setattr(pt, "write_result", spy)
    run = Run(load(merge=True, new_tokens=[WORD], **BASE_OF_IT), tmp_path, monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained(run.made)
    assert tokenizer(WORD).input_ids == tokens[0]
    assert len(tokens[0]) == 1
    model = AutoModelForCausalLM.from_pretrained(run.made)
    assert model.config.tie_word_embeddings
    torch.testing.assert_close(logits(model, tokenizer), seen[0], atol=1e-4, rtol=0)
    assert next(run.trainer.model.parameters(), None) is None, "the trained model's memory is free"
    assert not (run.folder / "unmerged").exists()
    provenance = json.loads((run.made / "provenance.json").read_text())
    assert provenance["base_model"] == "tiny"
    assert provenance["metrics"]["eval_loss"] < provenance["metrics"]["eval_loss_before"]


def test_a_base_without_a_chat_template_makes_a_base_but_no_adapter(
    load: Callable[..., Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mute = tmp_path / "mute"
    mute.mkdir()
    for file in base.iterdir():
        if file.name != "chat_template.jinja":
            (mute / file.name).write_bytes(file.read_bytes())
    texts = {"base_model": str(mute), "train_files": ["texts_heldout.txt"], "evaluation_files": []}
    with pytest.raises(ConfigError, match="mute has no chat template"):
        run_job(load(**texts), tmp_path / "one")
    run = Run(load(**texts, full=True, max_steps=1, **BASE_OF_IT), tmp_path / "two", monkeypatch)
    assert AutoTokenizer.from_pretrained(run.made).chat_template is None


def test_packing_is_refused_or_skipped_if_not_exact(
    load: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "is_exact", lambda model: False)
    with pytest.raises(ConfigError, match="packing: the base model's architecture cannot"):
        run_job(load(packing=True), tmp_path / "one")
    run = Run(load(max_steps=1), tmp_path / "two", monkeypatch)
    assert "attention_mask" in run.batches[0]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("感冒有什么症状？多休息。", "感冒有什么症状？"),
        ("  Take 2.5 mg twice. Then rest.", "Take 2.5 mg twice."),
        ("no end", "no end"),
        ("标题\n正文。", "标题"),
    ],
)
def test_the_first_sentence(text: str, first: str) -> None:
    assert next(pt._sentences(text)) == first
