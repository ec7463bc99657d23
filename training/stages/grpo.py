"""GRPO or RLOO: trains an adapter for a higher reward, with several answers per prompt instead of a value model."""

import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from trl import import_utils

# TRL imports vLLM if it is installed, but this stage does not generate with it.
with patch.object(import_utils, "is_vllm_available", lambda min_version=None: False):
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from training.artifacts.result import golden_rows, write_result
from training.config import GrpoConfig
from training.data import read_documents, read_prompts, report
from training.models.base_model import find_base
from training.models.golden import prompts_of
from training.models.lora import trainable
from training.rl.rewards import Rewards, names, plain_scorer, standalone_scorer
from training.runs.run import Run
from training.tokens.examples import prompts
from training.trainers.fit import arguments, fit, prepare


def train(config: GrpoConfig, run: Run) -> Path:
    """Train the adapter; return a folder ready to publish.

    Raises ConfigError (base model, policy or reward not found), DataError, Stopped.
    """
    prepare(config)
    rows = read_prompts(config.train_files, config.on_error, config.seed)
    general_rows = read_documents(config.general_files, config.on_error)
    report(rows, [], general_rows).log()
    base = find_base(config, run.store)
    rows = prompts(rows, base.tokenizer, base.longest(config), config.on_error).rows
    golden = golden_rows(prompts_of(rows), base, config)
    rewards = Rewards(
        [
            (
                name,
                reward.weight,
                standalone_scorer(reward.adapter, base, run.store)
                if reward.adapter
                else plain_scorer(reward),
            )
            for name, reward in zip(names(config.reward), config.reward, strict=True)
        ]
    )

    # A step takes batch_size / generations different rows, and TRL drops an incomplete step: repeat too few rows.
    rounds = math.ceil(config.batch_size / config.generations / len(rows))
    to_train = trainable(config, base, run.store)

    def reward(
        completions: Any, completion_ids: Any, reference: Any, log_metric: Any, **given: Any
    ) -> list[float]:
        asked = [[*prompt, *answer] for prompt, answer in zip(given["prompts"], completions, strict=True)]
        total, parts = rewards(asked, reference)
        for name, mean in parts.items():
            log_metric(name, mean)
        is_cut = [ids[-1] not in base.stops.token_ids for ids in completion_ids]
        return (total - config.no_stop_penalty * torch.tensor(is_cut)).tolist()

    trainers = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}
    arguments_of, trainer_of = trainers[config.algorithm]
    trainer = trainer_of(
        args=arguments_of(
            **(arguments(config, run) | {"logging_steps": 1}),
            max_steps=config.steps,
            num_generations=config.generations,
            max_completion_length=config.max_new_tokens,
            beta=config.beta,
        ),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(
            [{"prompt": row["prompt"], "reference": row.get("reference", "")} for row in rows] * rounds
        ),
        processing_class=base.tokenizer,
        **to_train,
    )
    metrics = fit(trainer, config, run, general_rows) | _earned(trainer.state.log_history)
    return write_result(trainer.model, base, config, run, rows=golden, metrics=metrics)


def _earned(logs: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean reward, KL and length of the last steps, and the mean reward of the first ones."""
    steps = [log for log in logs if "reward" in log]
    few = max(1, len(steps) // 8)

    def mean(name: str, logs: list[dict[str, float]]) -> float:
        return sum(log.get(name, 0.0) for log in logs) / len(logs)

    return {
        "reward_before": mean("reward", steps[:few]),
        "reward": mean("reward", steps[-few:]),
        "kl": mean("kl", steps[-few:]),
        "length": mean("completions/mean_length", steps[-few:]),
    }
