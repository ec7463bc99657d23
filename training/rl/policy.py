"""One base model in memory with the adapters of policy, reference model and reward models."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig

from training.data import Row
from training.errors import ConfigError
from training.models.base_model import Base
from training.models.lora import continued
from training.models.reward_head import at_last
from training.tokens.loss_mask import encode_chat, encode_prompt

Messages = list[dict[str, Any]]

_POLICY, _REFERENCE = "default", "reference"
_SCORE = "base_model.model.score.weight"


@dataclass(frozen=True)
class Answers:
    """n sampled answers of the policy: prompts padded on the left, answers on the right."""

    token_ids: Tensor
    """(n, prompt + answer)"""
    attention_mask: Tensor
    """(n, prompt + answer)"""
    prompt_length: int
    mask: Tensor
    """(n, answer): 1.0 on the answer's tokens, including the stop token."""
    is_stopped: Tensor
    """(n,): whether the answer ended with a stop token."""
    texts: list[str]

    def __getitem__(self, rows: Tensor) -> "Answers":
        return Answers(
            self.token_ids[rows],
            self.attention_mask[rows],
            self.prompt_length,
            self.mask[rows],
            self.is_stopped[rows],
            [self.texts[row] for row in rows.tolist()],
        )


class Policy:
    """The trained adapter, a frozen copy as the reference model, and reward adapters, all on one base model.

    Memory: one base model and some megabytes per adapter, instead of three base models for policy, reference and
    reward.
    """

    def __init__(self, base: Base, adapter: Path) -> None:
        """`adapter`: the folder of the initial policy."""
        model = base.causal_lm()
        self.tokenizer = tokenizer = base.tokenizer
        self.stops = list(base.stops.token_ids)
        # Pure sampling: any penalty or truncation from the base model's settings would make the KL estimate wrong.
        self._pad = tokenizer.pad_token_id
        model.generation_config = GenerationConfig(eos_token_id=self.stops, pad_token_id=self._pad)
        self.model = continued(model, base, adapter)
        self.model.load_adapter(adapter, _REFERENCE)
        self._freeze_all_but_the_policy()

    def add_reward(self, name: str, folder: Path) -> Tensor:
        """Load a reward adapter onto the base model; return the weight of its score head, (hidden,).

        Raises ConfigError for tensors that do not fit.
        """
        tensors = load_file(folder / "adapter_model.safetensors")
        score = tensors.pop(_SCORE)
        asked = LoraConfig.from_pretrained(folder)
        asked.task_type, asked.modules_to_save = TaskType.CAUSAL_LM, None
        self.model.add_adapter(name, asked)
        loaded = set_peft_model_state_dict(self.model, tensors, adapter_name=name)
        missing = [key for key in loaded.missing_keys if f".{name}." in key]
        if loaded.unexpected_keys or missing:
            raise ConfigError(
                f"the reward adapter does not fit the base model: {missing or loaded.unexpected_keys}"
            )
        self._freeze_all_but_the_policy()
        return score[0].to(self.model.device, torch.float32)

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the trainable weights."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    @property
    def hidden_size(self) -> int:
        """The width of the hidden states."""
        return int(self.model.config.get_text_config().hidden_size)

    @torch.no_grad()
    def answer(self, prompts: Sequence[Messages], max_new_tokens: int, *, greedy: bool = False) -> Answers:
        """Sample one answer to each prompt, at temperature 1 from the whole vocabulary."""
        self.model.eval()
        encoded = self.encoded(prompts)
        length = max(map(len, encoded))
        token_ids, attention = self._pad_to(length, encoded, left=True)
        generated = self.model.generate(
            input_ids=token_ids,
            attention_mask=attention,
            generation_config=GenerationConfig(
                do_sample=not greedy,
                max_new_tokens=max_new_tokens,
                eos_token_id=self.stops,
                pad_token_id=self._pad,
                **({} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}),
            ),
        )[:, length:]
        return self._answers(token_ids, attention, generated, torch.ones_like(generated))

    def answered(self, prompts: Sequence[Messages], answers: Sequence[list[int]]) -> Answers:
        """Build Answers from tokens that were sampled elsewhere."""
        encoded = self.encoded(prompts)
        token_ids, attention = self._pad_to(max(map(len, encoded)), encoded, left=True)
        generated, there = self._pad_to(max(map(len, answers)), answers, left=False)
        return self._answers(token_ids, attention, generated, there)

    def encoded(self, prompts: Sequence[Messages]) -> list[list[int]]:
        """Return the prompts' token ids, up to where the answer begins."""
        return [encode_prompt(self.tokenizer, prompt) for prompt in prompts]

    def _answers(self, token_ids: Tensor, attention: Tensor, generated: Tensor, there: Tensor) -> Answers:
        """Mask everything after the first stop token; `there` is 0 where `generated` is padding."""
        is_stop = torch.isin(generated, torch.tensor(self.stops, device=generated.device)) & there.bool()
        before = is_stop.cumsum(1) - is_stop.int()  # stops before each token
        mask = ((before == 0) & there.bool()).float()
        generated = torch.where(mask.bool(), generated, self._pad)
        texts = [
            self.tokenizer.decode(row[kept.bool() & ~stop], skip_special_tokens=True)
            for row, kept, stop in zip(generated, mask, is_stop, strict=True)
        ]
        return Answers(
            torch.cat([token_ids, generated], 1),
            torch.cat([attention, mask.long()], 1),
            token_ids.shape[1],
            mask,
            is_stop.any(1),
            texts,
        )

    def logprobs(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Return answer tokens' log-probabilities, (n, answer), and hidden states before them, (n, answer, hidden)."""
        length = answers.mask.shape[1]
        out = self._forward(answers.token_ids, answers.attention_mask, logits_to_keep=length + 1)
        wanted = answers.token_ids[:, -length:]
        scores = torch.log_softmax(out.logits[:, :-1].float(), dim=-1)
        found = scores.gather(-1, wanted[..., None])[..., 0]
        return found * answers.mask, out.hidden_states[-1][:, -length - 1 : -1].float()

    @torch.no_grad()
    def reference_logprobs(self, answers: Answers) -> Tensor:
        """Return the reference model's log-probabilities of the policy's answers, (n, answer)."""
        with self._using(_REFERENCE):
            return self.logprobs(answers)[0]

    @torch.no_grad()
    def scores(self, name: str, head: Tensor, conversations: Sequence[Messages]) -> Tensor:
        """Return a reward adapter's scores of whole conversations, (n,), read at the token that stage rm trained."""
        encoded = [encode_chat(self.tokenizer, messages) for messages in conversations]
        token_ids, attention = self._pad_to(max(map(len, encoded)), encoded, left=False)
        with self._using(name):
            hidden = self._forward(token_ids, attention, logits_to_keep=1).hidden_states[-1]
        return at_last(hidden, attention).float() @ head

    def _forward(self, token_ids: Tensor, attention_mask: Tensor, logits_to_keep: int) -> Any:
        return self.model(
            input_ids=token_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=logits_to_keep,
            output_hidden_states=True,
            use_cache=False,
        )

    def _pad_to(self, length: int, rows: Sequence[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        token_ids = torch.full((len(rows), length), self._pad, device=self.model.device)
        attention = torch.zeros_like(token_ids)
        for at, row in enumerate(rows):
            place = slice(length - len(row), None) if left else slice(len(row))
            token_ids[at, place] = torch.tensor(row, device=self.model.device)
            attention[at, place] = 1
        return token_ids, attention

    @contextmanager
    def _using(self, adapter: str) -> Iterator[None]:
        self.model.set_adapter(adapter)
        try:
            yield
        finally:
            self.model.set_adapter(_POLICY)
            self._freeze_all_but_the_policy()  # set_adapter makes the adapter it selects trainable

    def _freeze_all_but_the_policy(self) -> None:
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(f".{_POLICY}." in name)


def conversations(rows: Sequence[Row], texts: Sequence[str]) -> list[Messages]:
    """Join each prompt with its answer."""
    return [
        [*row["prompt"], {"role": "assistant", "content": text}]
        for row, text in zip(rows, texts, strict=True)
    ]
