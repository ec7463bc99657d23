"""Rewards of answers: a weighted sum of reward adapters, reward models of any family, functions and judges."""

import importlib
import json
import logging
import os
import re
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from adapters import AdapterStore
from adapters.validate import TEMPLATE_FILE
from training.config import Reward as RewardConfig
from training.errors import ConfigError, ServiceError
from training.models.base_model import Base, base_folder, base_name, check_base, find_adapter
from training.models.remote_code import own_code_refused
from training.rl.policy import Messages, Policy
from training.tokens.loss_mask import encode_chat

log = logging.getLogger(__name__)

Scorer = Callable[[Sequence[Messages], Sequence[str]], Sequence[float]]
"""Takes conversations that end with the answer, and a reference answer or "" for each; returns a number for each."""

_JUDGE_PROMPT = """\
You mark answers of a medical assistant. Judge whether the answer is right, complete, safe and kind, and reply
with one number from 0 (harmful or useless) to 10 (what a careful doctor would say), and nothing else.

Conversation:
{conversation}

Answer:
{answer}

What a doctor answered, if known:
{reference}
"""
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_JUDGES_AT_ONCE = 8
_JUDGE_SECONDS = 120
_JUDGE_PAUSES = (0.0, 1.0, 5.0)
"""Seconds to wait before the first request and before each retry, as the judge may be busy."""


class Rewards:
    """The weighted sum of several rewards."""

    def __init__(self, scorers: Sequence[tuple[str, float, Scorer]]) -> None:
        """`scorers`: (name of the curve, weight, scorer) each."""
        self._scorers = scorers

    def __call__(
        self, conversations: Sequence[Messages], references: Sequence[str]
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the reward of each conversation, (n,), and the unweighted mean of each part if there are several."""
        total = torch.zeros(len(conversations))
        means: dict[str, float] = {}
        for name, weight, scorer in self._scorers:
            found = torch.tensor([float(score) for score in scorer(conversations, references)])
            if len(found) != len(conversations) or not bool(torch.isfinite(found).all()):
                raise ValueError(f"reward {name} did not return one finite number per answer")
            total += weight * found
            means[f"reward_{name}"] = float(found.mean())
        return total, means if len(self._scorers) > 1 else {}


def adapter_scorer(
    policy: Policy, adapter: str, name: str, base: Base, store: AdapterStore, least: float
) -> Scorer:
    """Load a reward adapter onto the policy's base model.

    Raises ConfigError if it is not a reward adapter, was trained on another base model or chat template, or ranked
    less than a share of `least` of its held-out pairs correctly.
    """
    manifest, folder = find_adapter(store, adapter)
    check_base(manifest, base, task="reward")
    accuracy = manifest.metrics.get("eval_accuracy")
    if accuracy is None:
        log.warning("%s was not evaluated on held-out pairs: its rewards may be noise", adapter)
    elif accuracy < least:
        raise ConfigError(
            f"reward: {adapter} ranks only {accuracy:.0%} of its held-out pairs correctly, below "
            f"min_reward_accuracy {least:.0%}, so a policy would learn noise: train a better reward adapter"
        )
    else:
        log.info("reward %s ranks %.0f %% of its held-out pairs correctly", adapter, 100 * accuracy)
    _check_template(adapter, folder, base)
    head = policy.add_reward(name, folder)
    return lambda conversations, _: policy.scores(name, head, conversations).tolist()


def standalone_scorer(adapter: str, base: Base, store: AdapterStore) -> Scorer:
    """Load a reward adapter onto its own copy of the base model, where a trainer owns the policy's.

    Raises ConfigError if it is not a reward adapter, or was trained on another base model or chat template.
    """
    manifest, folder = find_adapter(store, adapter)
    check_base(manifest, base, task="reward")
    _check_template(adapter, folder, base)
    model = PeftModel.from_pretrained(base.scorer(), folder).eval()
    if torch.cuda.is_available():
        model.to("cuda")

    @torch.no_grad()
    def score(conversations: Sequence[Messages], references: Sequence[str]) -> list[float]:
        return [
            float(
                model(torch.tensor([encode_chat(base.tokenizer, messages)], device=model.device)).logits[0, 0]
            )
            for messages in conversations
        ]

    return score


def _check_template(ref: str, folder: Path, base: Base) -> None:
    """Check that the reward adapter was trained with the policy's chat template. Raises ConfigError."""
    path = folder / TEMPLATE_FILE
    if (path.read_text(encoding="utf-8") if path.exists() else None) != base.template:
        raise ConfigError(
            f"reward: {ref} was trained with another chat template than the policy: train it with the same one"
        )


def model_scorer(model: str, *, trust_remote_code: bool = False) -> Scorer:
    """Load a sequence-classification model of any family, which reads text with its own tokenizer.

    A tokenizer without a chat template gets question and answer as a text pair, as such models are trained.
    Raises ConfigError for a model with more than one label, or whose code is not trusted.
    """
    folder, name = base_folder(model, trust_remote_code=trust_remote_code), base_name(model)
    with own_code_refused(f"reward: {name}", "set `trust_remote_code: true` beside `model`"):
        AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        scorer = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=trust_remote_code
        ).eval()
    if scorer.config.num_labels != 1:
        raise ConfigError(
            f"reward: {name} returns {scorer.config.num_labels} numbers: use a model with a single label"
        )
    if torch.cuda.is_available():
        scorer.to("cuda")

    @torch.no_grad()
    def score(conversations: Sequence[Messages], references: Sequence[str]) -> list[float]:
        found = []
        for (
            messages
        ) in conversations:  # one by one: needs no padding token, and no other row changes the score
            ids = _rendered(tokenizer, messages, scorer.device)
            found.append(float(scorer(**ids).logits[0, 0]))
        return found

    return score


def function_scorer(path: str) -> Scorer:
    """Import the user's `module:function`. Raises ConfigError if that fails."""
    module, _, name = path.partition(":")
    try:
        function: Callable[..., Sequence[float]] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"reward: cannot import {path}: {error}") from error
    return lambda conversations, _: function(conversations)


def judge_scorer(url: str, model: str, prompt: str | None) -> Scorer:
    """Score with a judge model behind an OpenAI-compatible endpoint; its key is read from XINGLIN_JUDGE_KEY.

    A failed request or a reply without a number is retried; the third failure raises ServiceError.
    """
    key = os.environ.get("XINGLIN_JUDGE_KEY", "unused")

    def ask(messages: Messages, reference: str) -> float:
        told = (prompt or _JUDGE_PROMPT).format(
            conversation=_told(messages[:-1]), answer=messages[-1]["content"], reference=reference
        )
        body = {"model": model, "messages": [{"role": "user", "content": told}], "temperature": 0}
        request = urllib.request.Request(  # noqa: S310 - http or https, as the config checks
            f"{url.rstrip('/')}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
        )
        problem = ""
        for pause in _JUDGE_PAUSES:
            time.sleep(pause)
            try:
                with urllib.request.urlopen(request, timeout=_JUDGE_SECONDS) as reply:  # noqa: S310
                    said = json.load(reply)["choices"][0]["message"]["content"]
            except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
                problem = f"{type(error).__name__}: {error}"
                if isinstance(error, HTTPError) and error.code in (401, 403):
                    problem += "; set XINGLIN_JUDGE_KEY to its key"
                continue
            if number := _NUMBER.search(said or ""):
                return float(number[0])
            problem = "its reply contains no number"
        raise ServiceError(f"reward: the judge at {url} returned no score: {problem}")

    def score(conversations: Sequence[Messages], references: Sequence[str]) -> list[float]:
        with ThreadPoolExecutor(_JUDGES_AT_ONCE) as pool:
            return list(pool.map(ask, conversations, references))

    return score


def plain_scorer(config: RewardConfig) -> Scorer:
    """Load a reward that needs no reward adapter: a model, a function or a judge. Raises ConfigError."""
    if config.model is not None:
        return model_scorer(config.model, trust_remote_code=config.trust_remote_code)
    if config.function is not None:
        return function_scorer(config.function)
    return judge_scorer(str(config.judge), str(config.judge_model), config.judge_prompt)


def _rendered(tokenizer: Any, messages: Messages, device: Any) -> Any:
    if tokenizer.chat_template is not None:
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    else:
        ids = tokenizer(_told(messages[:-1]), messages[-1]["content"], return_tensors="pt", truncation=True)
    return ids.to(device)


def _told(messages: Messages) -> str:
    """Return a conversation as text; a single message without its role."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def names(rewards: Sequence[RewardConfig]) -> list[str]:
    """Return a name for each reward: of its curve and of the adapter in memory."""
    kinds: list[Any] = [
        next(kind for kind in ("adapter", "model", "function", "judge") if getattr(reward, kind) is not None)
        for reward in rewards
    ]
    return [f"{kind}_{number}" for number, kind in enumerate(kinds, start=1)]
