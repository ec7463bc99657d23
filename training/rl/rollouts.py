"""Rollouts from a running service: the current policy is published there and queried like any adapter.

An engine answers hundreds of prompts at once; a trainer's own loop takes them in one padded batch. Four rules keep the
rollouts exact: each request has its own seed, so that other requests do not change the draws; the service must render
prompts to the same tokens as training; answers return as token ids; and training uses its own log-probabilities, and
only compares those of the service with them.
"""

import asyncio
import io
import logging
import os
import tarfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import openai
import torch
from openai.types.chat import ChatCompletion
from torch import Tensor

from training.config import PpoConfig
from training.errors import ServiceError
from training.rl.policy import Answers, Messages, Policy

log = logging.getLogger(__name__)

_ALIAS = "default"
_WHY = "rollouts"
_SEEDS = 2**31
_SECONDS = 600.0
# Overrides the base model's generation_config.json: training assumes that answers are drawn from the policy itself.
_PURE_SAMPLING = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def sampler(
    config: PpoConfig, policy: Policy, write: Callable[[], Path]
) -> AbstractContextManager["Rollouts | None"]:
    """Return the job's rollout service, or None if it sets none."""
    if config.rollout_service is None:
        return nullcontext()
    return Rollouts(str(config.rollout_service), f"{config.name}-rollouts", policy, write)


@dataclass(frozen=True)
class _Sample:
    """One answer that the service sampled."""

    prompt_token_ids: list[int]
    token_ids: list[int]  # including the stop token, unless the answer was cut
    logprobs: list[float]


class Rollouts:
    """The policy, published under a name at a running service. Use it as a context manager.

    The service's admin key is read from XINGLIN_ADMIN_KEY.
    """

    def __init__(self, url: str, name: str, policy: Policy, write: Callable[[], Path]) -> None:
        """`write` writes the current policy as an adapter folder that a service accepts, and returns the folder."""
        self._url = f"{url.rstrip('/')}/v1"
        self._name = name
        self._policy = policy
        self._write = write
        self._key = os.environ.get("XINGLIN_ADMIN_KEY", "unused")
        self._published = b""
        self._revision = ""
        self._samples: list[_Sample] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._revision:
            try:
                self._admin("DELETE", f"/adapters/{self._name}/aliases/{_ALIAS}")
                self._prune()
            except ServiceError as error:  # must not fail a finished run, nor hide the error that ends it
                log.warning(
                    "%s could not be removed from the service; remove it there: %s", self._name, error
                )

    def answer(self, prompts: Sequence[Messages], max_new_tokens: int) -> Answers:
        """Sample one answer to each prompt, like `Policy.answer`, at the service; torch's generator draws the seeds.

        Raises ServiceError if the service fails, or renders prompts to other tokens.
        """
        self._publish()
        seeds = torch.randint(_SEEDS, (len(prompts),)).tolist()
        self._samples = asyncio.run(self._sample(prompts, max_new_tokens, seeds))
        if [sample.prompt_token_ids for sample in self._samples] != self._policy.encoded(prompts):
            raise ServiceError(
                f"rollout_service: {self._url} renders prompts to other tokens than this job: check that it serves "
                "the same base model"
            )
        return self._policy.answered(prompts, [sample.token_ids for sample in self._samples])

    def difference(self, logprobs: Tensor) -> float:
        """Return the largest difference between `logprobs` and the service's over all tokens of the last answers."""
        return max(
            float((row[: len(sample.logprobs)].cpu() - torch.tensor(sample.logprobs)).abs().max())
            for row, sample in zip(logprobs, self._samples, strict=True)
        )

    def _publish(self) -> None:
        """Publish the current policy at the service, which loads and proves it before it answers."""
        archive = _packed(self._write())
        if archive != self._published:
            asked = {"name": self._name, "alias": _ALIAS, "why": _WHY}
            self._revision = self._admin("POST", "/adapters", asked, archive)["revision"]
            self._published = archive
            self._prune()

    async def _sample(
        self, prompts: Sequence[Messages], max_new_tokens: int, seeds: Sequence[int]
    ) -> list[_Sample]:
        async with openai.AsyncOpenAI(base_url=self._url, api_key=self._key, timeout=_SECONDS) as client:

            async def ask(messages: Any, seed: int) -> _Sample:
                with_raw = client.chat.completions.with_raw_response
                raw = await with_raw.create(
                    model=self._name,
                    messages=messages,
                    max_tokens=max_new_tokens,
                    seed=seed,
                    temperature=1,
                    top_p=1,
                    logprobs=True,
                    extra_body={**_PURE_SAMPLING, "return_token_ids": True},
                )
                return self._read(raw.headers.get("x-adapter-revision"), raw.parse())

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(ask(messages, seed))
                        for messages, seed in zip(prompts, seeds, strict=True)
                    ]
            except ExceptionGroup as errors:  # the first one is enough
                error = errors.exceptions[0]
                raise (self._refused(error) if isinstance(error, openai.OpenAIError) else error) from errors
            return [task.result() for task in tasks]

    def _read(self, revision: str | None, reply: ChatCompletion) -> _Sample:
        if revision != self._revision:
            raise ServiceError(
                f"rollout_service: {self._name}@{revision} answered instead of @{self._revision}: someone else "
                "changed this adapter: give each concurrent job its own name"
            )
        choice = reply.choices[0]
        scores = choice.logprobs.content if choice.logprobs else None
        return _Sample(
            list((reply.model_extra or {})["prompt_token_ids"]),
            list((choice.model_extra or {})["token_ids"]),
            [score.logprob for score in scores or ()],
        )

    def _prune(self) -> None:
        self._admin("POST", f"/adapters/{self._name}/prune", {"keep": 0, "why": _WHY})

    def _admin(
        self, method: str, path: str, body: dict[str, Any] | None = None, archive: bytes | None = None
    ) -> dict[str, Any]:
        request: dict[str, Any] = {"cast_to": object}
        if body is not None:
            request["body"] = body
        if archive is not None:
            request["files"] = [("file", ("adapter.tar.gz", archive))]
            request["options"] = {"headers": {"Content-Type": "multipart/form-data"}}
        try:
            with openai.OpenAI(base_url=self._url, api_key=self._key, timeout=_SECONDS) as client:
                reply: dict[str, Any] = getattr(client, method.lower())(path, **request)
        except openai.OpenAIError as error:
            raise self._refused(error) from error
        return reply

    def _refused(self, error: BaseException) -> ServiceError:
        hint = ""
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            hint = "; set XINGLIN_ADMIN_KEY to the service's admin key"
        if isinstance(error, openai.APIConnectionError):
            hint = "; check that it runs and serves this job's base model"
        return ServiceError(f"rollout_service: {self._url}: {error}{hint}")


def _packed(folder: Path) -> bytes:
    """Pack a folder as tar: the same files always give the same bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path in sorted(folder.iterdir()):
            content = path.read_bytes()
            member = tarfile.TarInfo(path.name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()
