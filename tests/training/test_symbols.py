"""The internals of TRL, transformers and PEFT that training uses exist: an upgrade that moves them fails here first."""

import dataclasses
import inspect
import subprocess
import sys
from typing import Any

import peft
import pytest
import transformers
import trl
from transformers import Trainer, TrainerCallback
from transformers.utils.chat_template_utils import render_jinja_template
from trl import import_utils
from trl.trainer.utils import FusedCausalLMOutput

from training.stages import dpo, kto, orpo, rm
from training.stages.orpo import ORPOTrainer
from training.trainers import callback, fit
from training.trainers.supervised import SupervisedTrainer

OURS = [dpo._Trainer, kto._Trainer, orpo._Trainer, rm._Trainer, SupervisedTrainer]
CALLBACKS = [
    kind
    for module in (fit, callback)
    for kind in vars(module).values()
    if inspect.isclass(kind) and issubclass(kind, TrainerCallback) and kind.__module__ == module.__name__
]


def _methods(kind: type) -> list[str]:
    return [name for name, value in vars(kind).items() if inspect.isfunction(value) and name != "__init__"]


@pytest.mark.parametrize("kind", OURS)
def test_overriding_methods_override_something(kind: Any) -> None:
    parents = kind.__mro__[1:]
    assert _methods(kind)
    for name in _methods(kind):
        assert any(name in vars(parent) for parent in parents), f"{kind.__mro__[1].__name__} has no {name}"


@pytest.mark.parametrize("kind", CALLBACKS)
def test_callbacks_use_existing_hooks(kind: Any) -> None:
    heard = [name for name in _methods(kind) if name.startswith("on_")]
    assert heard
    assert not [name for name in heard if not hasattr(TrainerCallback, name)]


@pytest.mark.parametrize(
    ("kind", "inside"),
    [
        (Trainer, "self._run_epoch("),  # replaced if no steps are left to train
        (Trainer, "self._get_train_sampler"),
        (trl.RewardTrainer, "self._metrics["),
        (trl.SFTTrainer, "fused_lm_head"),
        (trl.KTOTrainer, "KL_completion_ids"),
        (trl.KTOTrainer, "calculate_KL"),
        (ORPOTrainer, "self.tokenize_row"),
    ],
)
def test_used_internals_exist(kind: type, inside: str) -> None:
    assert inside in "".join(inspect.getsource(one) for one in kind.__mro__[:-1] if one is not object)


def test_the_fused_heads_output_has_our_fields() -> None:
    assert {"log_probs", "entropy", "is_top1", "label_mask"} <= {
        field.name for field in dataclasses.fields(FusedCausalLMOutput)
    }


def test_the_arguments_of_transformers_template_rendering() -> None:
    assert {"conversations", "chat_template"} <= {*inspect.signature(render_jinja_template).parameters}


def test_grpo_imports_no_serving_engine() -> None:
    """TRL would import vLLM if it is installed: that takes ten seconds, and this stage does not use it."""
    assert "min_version" in inspect.signature(import_utils.is_vllm_available).parameters
    code = "import sys, training.stages.grpo; print('vllm' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("library", [peft, transformers, trl])
def test_the_versions_are_the_pinned_ones(library: Any) -> None:
    with open("requirements/cpu.txt", encoding="utf-8") as lock:
        assert f"{library.__name__}=={library.__version__}" in lock.read().splitlines()
