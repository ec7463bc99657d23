"""The trainer's side of the demo's models, to compare with and to make further revisions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters import AdapterRef, AdapterStore, GoldenPrompt, Provenance, read_golden, write_golden
from training.models.golden import golden_prompts


class Trainer:
    """The demo's base with the adapter `doctor` in transformers and PEFT."""

    def __init__(self, data_dir: Path) -> None:
        torch.set_num_threads(1)
        store = AdapterStore(data_dir / "store")
        self.manifest = store.get(AdapterRef.parse("doctor"))
        self.folder = store.folder("doctor", self.manifest.revision)
        base = data_dir / "models" / "xinglin-demo"
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(model, self.folder)
        for name in ("leaflet", "doctor-ppo"):
            self.load(name, store.folder(name, store.aliases(name)["default"]))
        self.model.eval()
        self._trained = {name: value.clone() for name, value in self._parameters()}

    def _parameters(self) -> list[tuple[str, Any]]:
        return [(name, value) for name, value in self.model.named_parameters() if ".default." in name]

    def load(self, name: str, folder: Path) -> None:
        """Take another adapter in, to be answered with."""
        self.model.load_adapter(folder, name)

    def answer(self, question: str, adapter: str | None) -> list[int]:
        """Greedy token ids by transformers' own `generate`; `adapter` is default (doctor), another loaded, or None."""
        (tokens,) = self.answers([question], adapter)
        return tokens

    def answers(self, questions: Sequence[str], adapter: str | None) -> list[list[int]]:
        """Of several questions in one batch."""
        conversations = [[{"role": "user", "content": question}] for question in questions]
        prompts = self.tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True,
            tokenizer_kwargs={"padding_side": "left"},
        )  # fmt: skip
        if adapter:
            self.model.set_adapter(adapter)
        with torch.inference_mode(), nullcontext() if adapter else self.model.disable_adapter():
            outputs = self.model.generate(**prompts, max_new_tokens=200, do_sample=False)
        self.model.set_adapter("default")
        return [self._until_its_end(row[prompts["input_ids"].shape[1] :].tolist()) for row in outputs]

    def _until_its_end(self, tokens: list[int]) -> list[int]:
        end = self.model.generation_config.eos_token_id
        ends = [
            place
            for place, token in enumerate(tokens, start=1)
            if token in (end if isinstance(end, list) else [end])
        ]
        return tokens[: ends[0]] if ends else tokens

    def variant(self, folder: Path, *, seed: int, noise: float = 0.05) -> Path:
        """Another revision of `doctor`, as if trained on: its weights moved a little, with its own golden set."""
        generator = torch.Generator().manual_seed(seed)
        self.model.set_adapter("default")
        with torch.no_grad():
            for name, value in self._parameters():
                trained = self._trained[name]
                value.copy_(trained + noise * trained.std() * torch.randn(trained.shape, generator=generator))
        rows = [
            {"messages": [*prompt.messages, {"role": "assistant", "content": ""}]} for prompt in self.golden
        ]
        self.model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
        write_golden(
            folder / "golden.jsonl",
            golden_prompts(self.model, self.tokenizer, rows, 8, 32, stops=[self.tokenizer.eos_token_id]),
        )
        (folder / "provenance.json").write_text(self.provenance())
        with torch.no_grad():
            for name, value in self._parameters():
                value.copy_(self._trained[name])
        return folder

    @contextmanager
    def rendering_with(self, template: str) -> Iterator[None]:
        """Prompts, those of golden sets too, are made with another chat template than the base model's."""
        before = self.tokenizer.chat_template
        self.tokenizer.chat_template = template
        try:
            yield
        finally:
            self.tokenizer.chat_template = before

    @property
    def golden(self) -> list[GoldenPrompt]:
        return read_golden(self.folder / "golden.jsonl")

    def provenance(self, **changes: Any) -> str:
        facts = {name: getattr(self.manifest, name) for name in Provenance.model_fields}
        return Provenance(**{**facts, "weights_digest": None, **changes}).model_dump_json()
