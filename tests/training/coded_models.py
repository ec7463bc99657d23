"""Models of an architecture of their own, as old ones of the hub are: their folder brings its Python code."""

import json
import sys
from pathlib import Path
from shutil import copytree

import pytest

_MODEL = """\
from torch.nn import Linear
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model, Qwen3PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class Config(Qwen3Config):
    model_type = "homemade"


class Homemade(Qwen3ForCausalLM):
    config_class = Config


class Marking(Qwen3PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.model = Qwen3Model(config)
        self.score = Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, **inputs):
        return SequenceClassifierOutput(logits=self.score(self.model(**inputs).last_hidden_state[:, -1]))
"""
_TOKENIZER = """\
from transformers import PreTrainedTokenizerFast


class Words(PreTrainedTokenizerFast):
    pass
"""


def with_own_code(model: Path, target: Path) -> Path:
    """A copy of a Qwen3 model's folder that says it is of another architecture, with a tokenizer of its own too."""
    copytree(model, target)
    _set(
        target / "config.json",
        model_type="homemade",
        auto_map={
            "AutoConfig": "homemade.Config",
            "AutoModelForCausalLM": "homemade.Homemade",
            "AutoModelForSequenceClassification": "homemade.Marking",
        },
    )
    _set(
        target / "tokenizer_config.json",
        tokenizer_class="Words",
        auto_map={"AutoTokenizer": [None, "words.Words"]},
    )
    (target / "homemade.py").write_text(_MODEL)
    (target / "words.py").write_text(_TOKENIZER)
    return target


def _set(file: Path, **settings: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def modules_below(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that is trusted is copied to `folder`, and not to the cache of whoever runs the test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
