"""Proximal policy optimisation: trains an adapter for a higher reward.

Each step: the policy answers a batch of prompts; each answer gets its reward minus a KL penalty against the reference
model; advantages compare it with the value head's estimate; a few passes over the answers update the policy with
clipped steps.

All randomness of a step depends only on the seed and the step's number, so that a resumed run continues exactly as it
would have.
"""

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.artifacts.result import golden_rows, write_for_rollouts, write_result
from training.config import PpoConfig
from training.data import Row, read_documents, read_prompts, report
from training.models.base_model import Base, check_base, find_adapter, find_base
from training.models.golden import prompts_of
from training.rl.objective import (
    KlCoefficient,
    advantages,
    masked_mean,
    policy_loss,
    value_loss,
    whiten,
)
from training.rl.policy import Answers, Policy, conversations
from training.rl.rewards import Rewards, adapter_scorer, names, plain_scorer
from training.rl.rollouts import Rollouts, sampler
from training.runs.events import Evaluation, Progress
from training.runs.events import Stopped as StoppedEvent
from training.runs.progress import Meter
from training.runs.run import Run
from training.runs.stop import Stopped
from training.tokens.examples import prompts
from training.trainers.fit import prepare
from training.trainers.forgetting import Forgetting
from training.trainers.trackers import Boards

log = logging.getLogger(__name__)

_EVALUATION_PROMPTS = 64
_MOST_GRADIENT = 1.0
_CHECKPOINTS_KEPT = 2
_STATE = "state.pt"


@dataclass(frozen=True)
class Experience:
    """The answers of one step with their training signals; tensors of shape (answers, tokens)."""

    answers: Answers
    logprobs: Tensor
    advantages: Tensor
    returns: Tensor
    metrics: dict[str, float]


def train(config: PpoConfig, run: Run) -> Path:
    """Train the policy; return a folder ready to publish.

    Raises ConfigError (base model, policy or reward not found), DataError, Stopped.
    """
    prepare(config)
    train_rows = read_prompts(config.train_files, config.on_error, config.seed)
    evaluation_rows = read_prompts(config.evaluation_files, config.on_error)
    general_rows = read_documents(config.general_files, config.on_error)
    report(train_rows, evaluation_rows, general_rows).log()
    base = find_base(config, run.store)
    longest = base.longest(config)
    train = prompts(train_rows, base.tokenizer, longest, config.on_error).rows
    held_out = prompts(evaluation_rows, base.tokenizer, longest, config.on_error).rows
    rows = golden_rows(prompts_of(held_out or train), base, config)
    manifest, folder = find_adapter(run.store, config.policy)
    check_base(manifest, base)
    policy = Policy(base, folder)
    with sampler(
        config, policy, lambda: write_for_rollouts(policy.model, base, config, run, rows=rows)
    ) as rollouts:
        ppo = Ppo(config, policy, base, run, rollouts)
        few = held_out[:: max(1, len(held_out) // _EVALUATION_PROMPTS)]
        metrics = ppo.train(train, few, general_rows)
    return write_result(policy.model, base, config, run, rows=rows, metrics=metrics)


class Ppo:
    """A policy with a value head, their rewards and their optimizer."""

    def __init__(
        self, config: PpoConfig, policy: Policy, base: Base, run: Run, rollouts: Rollouts | None = None
    ) -> None:
        self._config = config
        self._run = run
        self._rollouts = rollouts
        self.policy = policy
        self._value_head = torch.nn.Linear(policy.hidden_size, 1, device=policy.model.device)
        torch.nn.init.zeros_(self._value_head.weight)
        torch.nn.init.zeros_(self._value_head.bias)
        self._rewards = Rewards(
            [
                (
                    name,
                    reward.weight,
                    adapter_scorer(policy, reward.adapter, name, base, run.store, config.min_reward_accuracy)
                    if reward.adapter
                    else plain_scorer(reward),
                )
                for name, reward in zip(names(config.reward), config.reward, strict=True)
            ]
        )
        self._kl = KlCoefficient(config.kl_coefficient, config.kl_target)
        self._metrics: dict[str, float] = {}
        self._optimizer = torch.optim.AdamW(
            [
                {"params": policy.parameters(), "lr": config.learning_rate},
                {"params": self._value_head.parameters(), "lr": config.value_learning_rate},
            ],
            weight_decay=0.0,
            betas=(0.9, 0.95),
        )

    def train(self, prompts: list[Row], held_out: list[Row], general_rows: list[Row]) -> dict[str, float]:
        """Run all remaining steps; return the metrics. Raises Stopped."""
        config, run = self._config, self._run
        first = self._resume()
        with Boards(config, run) as boards, run.stop.listening():
            forgetting = Forgetting(general_rows, self.policy.tokenizer, config, run, boards)
            if held_out and run.measured_before() is None:
                run.events.write(Evaluation(step=0, metrics=self.evaluate(held_out)))
            if first == 0:
                forgetting.before(self.policy.model)
            metrics = self._train(prompts, first, boards)
            if held_out:
                metrics = self.evaluate(held_out)
                run.events.write(Evaluation(step=config.steps, metrics=metrics))
                before = run.measured_before() or {}
                metrics |= {f"{name}_before": value for name, value in before.items()}
            return metrics | forgetting.after(self.policy.model, config.steps)

    def _train(self, prompts: list[Row], first: int, boards: Boards) -> dict[str, float]:
        """Run the steps after `first`; return the metrics of the last one."""
        config, run = self._config, self._run
        meter = Meter(config.name, config.steps, first)
        every = config.checkpoint_every or max(1, config.steps // 4)
        for step in range(first + 1, config.steps + 1):
            self._metrics = metrics = self.step(_batch(prompts, config, step), step)
            meter.update(step, metrics["loss"])
            run.events.write(
                Progress(step=step, max_steps=config.steps, eta_seconds=meter.eta_seconds(), metrics=metrics)
            )
            boards.write(step, metrics)
            is_stopping = run.stop.is_asked and step < config.steps
            if step % every == 0 or is_stopping:
                self._save(step)
            if is_stopping:
                run.events.write(StoppedEvent(step=step))
                raise Stopped(f"step {step} of {config.steps}")
        meter.close()
        return self._metrics

    def step(self, prompts: list[Row], step: int) -> dict[str, float]:
        """Sample answers, reward them and update the policy; return the step's metrics."""
        config = self._config
        torch.manual_seed(hash((config.seed, step)))
        experience = self.experience(prompts)
        losses: list[tuple[float, ...]] = []
        for _ in range(config.epochs):
            for rows in torch.randperm(len(prompts)).split(config.minibatch_size):
                losses.append(self._learn(experience, rows))
        loss, of_value, clipped, moved = (sum(column) / len(losses) for column in zip(*losses, strict=True))
        self._kl.update(experience.metrics["kl"])
        return {
            "loss": loss,
            **experience.metrics,
            "value_loss": of_value,
            "clip_fraction": clipped,
            "approximate_kl": moved,
            "kl_coefficient": self._kl.value,
        }

    @torch.no_grad()
    def experience(self, prompts: list[Row]) -> Experience:
        """Sample answers of the current policy, and compute their rewards, advantages and returns."""
        config = self._config
        answers = (self._rollouts or self.policy).answer(
            [row["prompt"] for row in prompts], config.max_new_tokens
        )
        score, parts = self._score(prompts, answers)
        logprobs, hidden = self.policy.logprobs(answers)
        kl = (logprobs - self.policy.reference_logprobs(answers)) * answers.mask
        values = self._values(hidden) * answers.mask

        # The KL penalty applies to each token, the reward to the last one.
        rewards = -self._kl.value * kl
        last = answers.mask.sum(1).long() - 1
        rewards[torch.arange(len(prompts)), last] += score.to(rewards.device)
        advantage = advantages(rewards, values, answers.mask, config.gae_lambda)
        return Experience(
            answers,
            logprobs,
            advantages=whiten(advantage, answers.mask),
            returns=advantage + values,
            metrics={
                "reward": float(score.mean()),
                **parts,
                "kl": float(kl.sum(1).mean()),
                "length": float(answers.mask.sum(1).mean()),
                "stopped": float(answers.is_stopped.float().mean()),
                **({"rollout_difference": self._rollouts.difference(logprobs)} if self._rollouts else {}),
            },
        )

    @torch.no_grad()
    def evaluate(self, held_out: list[Row]) -> dict[str, float]:
        """Return mean reward, KL and length over held-out prompts, always with the same random numbers."""
        state = torch.get_rng_state()
        torch.manual_seed(self._config.seed)
        found: list[dict[str, float]] = []
        size = self._config.batch_size
        for rows in (held_out[at : at + size] for at in range(0, len(held_out), size)):
            metrics = self.experience(rows).metrics
            found.append({name: value * len(rows) for name, value in metrics.items()})
        torch.set_rng_state(state)
        return {f"eval_{name}": sum(one[name] for one in found) / len(held_out) for name in found[0]}

    def _score(self, prompts: list[Row], answers: Answers) -> tuple[Tensor, dict[str, float]]:
        references = [row.get("reference", "") for row in prompts]
        score, parts = self._rewards(conversations(prompts, answers.texts), references)
        return score - self._config.no_stop_penalty * (~answers.is_stopped).float().cpu(), parts

    def _values(self, hidden: Tensor) -> Tensor:
        return self._value_head(hidden)[..., 0]

    def _learn(self, experience: Experience, rows: Tensor) -> tuple[float, ...]:
        """Take one optimiser step; return both losses, the share of clipped tokens and the approximate KL."""
        config, answers = self._config, experience.answers[rows]
        logprobs, hidden = self.policy.logprobs(answers)
        old = experience.logprobs[rows]
        of_policy = policy_loss(logprobs, old, experience.advantages[rows], answers.mask, config.clip)
        of_value = value_loss(self._values(hidden), experience.returns[rows], answers.mask)
        (of_policy + config.value_coefficient * of_value).backward()
        weights = [weight for group in self._optimizer.param_groups for weight in group["params"]]
        torch.nn.utils.clip_grad_norm_(weights, _MOST_GRADIENT)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            moved = old - logprobs
            clipped = ((moved.exp() - 1).abs() > config.clip).float()
            share, far = masked_mean(clipped, answers.mask), masked_mean(moved, answers.mask)
        return of_policy.item(), of_value.item(), share.item(), far.item()

    # Checkpoints

    def _save(self, step: int) -> None:
        state = {
            "policy": [weight.detach() for weight in self.policy.parameters()],
            "value_head": self._value_head.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "kl_coefficient": self._kl.value,
            "metrics": self._metrics,
        }
        self._run.save_checkpoint(
            step, lambda folder: torch.save(state, folder / _STATE), kept=_CHECKPOINTS_KEPT
        )

    def _resume(self) -> int:
        """Load the last checkpoint, if there is one; return the number of steps done."""
        checkpoint = self._run.last_checkpoint()
        if checkpoint is None:
            return 0
        state: dict[str, Any] = torch.load(checkpoint / _STATE, weights_only=True)
        with torch.no_grad():
            for weight, saved in zip(self.policy.parameters(), state["policy"], strict=True):
                weight.copy_(saved)
        self._value_head.load_state_dict(state["value_head"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._kl.value = state["kl_coefficient"]
        self._metrics = state["metrics"]
        return self._run.steps_done()


def _batch(prompts: list[Row], config: PpoConfig, step: int) -> list[Row]:
    """Return the prompts of a step: each epoch uses every prompt once, in a new random order."""
    places = range((step - 1) * config.batch_size, step * config.batch_size)
    epochs = {place // len(prompts) for place in places}
    order = {
        epoch: random.Random(f"{config.seed} {epoch}").sample(prompts, len(prompts))  # noqa: S311
        for epoch in epochs
    }
    return [order[place // len(prompts)][place % len(prompts)] for place in places]
