from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from adapters import AdapterStore
from tests.training.jobs import SFT, load_job
from training.errors import ConfigError
from training.estimate import estimate as module
from training.estimate.estimate import _Job, estimate, report
from training.estimate.memory import Ledger


def job(tiny_dir: Path, **changes: Any) -> Any:
    return load_job(tiny_dir, {**SFT, "batch_size": 4}, **changes)


def pairs(tiny_dir: Path, stage: str, **changes: Any) -> Any:
    return job(tiny_dir, stage=stage, **changes)


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


def test_the_ledger_counts_live_tensors_but_no_views() -> None:
    with Ledger() as ledger:
        kept = torch.empty(1000)
        view = kept[:10].view(2, 5)
        torch.empty(3000)
        assert (ledger.held, ledger.peak) == (4000, 16000)
        del kept
        assert ledger.held == 4000
        del view
        assert ledger.held == 0


def test_weights_of_base_model_and_adapter(tiny_dir: Path, store: AdapterStore) -> None:
    found = estimate(job(tiny_dir, lora={"r": 8}), store, "cpu")
    # 512 x 64 tied embeddings; two layers of q, k, v, o, feed-forward and norms; the last norm
    layer = 64 * (64 + 32 + 32 + 64 + 3 * 128) + 2 * 64 + 2 * 32
    assert found.parts["frozen weights"] == 4 * (512 * 64 + 2 * layer + 64)
    adapter = 2 * 8 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 128))
    assert found.trainable == adapter
    assert found.parts["trainable weights"] == 4 * adapter
    assert found.parts["gradients and optimizer"] == 12 * adapter
    assert found.total == sum(found.parts.values())


def test_general_files_count_if_they_have_the_peak(tiny_dir: Path, store: AdapterStore) -> None:
    config = job(tiny_dir, batch_size=1, max_length=16, general_files=["plain.jsonl"])
    small = estimate(config, store, "cpu")
    assert small.moment != "measuring general_files"
    assert small.total == estimate(config.model_copy(update={"general_files": []}), store, "cpu").total
    wide = _Job(config, "cpu", AutoConfig.for_model("qwen3", vocab_size=150_000))
    # A row of 1024 tokens has more logits than the limit of a batch; logits are float32 here.
    assert wide._measure(8, 1024) == 4 * 1024 * 150_000 + 12 * 2**24
    assert wide._measure(8, 16) == 4 * 8 * 16 * 150_000 + 12 * 2**24


def test_rows_need_memory_and_checkpointing_saves_it(tiny_dir: Path, store: AdapterStore) -> None:
    def moment(**changes: Any) -> int:
        return estimate(job(tiny_dir, **changes), store, "cpu").parts["activations, logits, cache"]

    usual = moment()
    assert moment(batch_size=8) > 1.5 * usual
    assert moment(max_length=512) > 1.5 * usual
    assert moment(gradient_checkpointing=True) < usual
    assert moment(gradient_accumulation_steps=4) >= usual


def test_weights_on_a_gpu_are_bfloat16_or_quantised(tiny_dir: Path, store: AdapterStore) -> None:
    whole = estimate(job(tiny_dir), store, "cpu").parts["frozen weights"]
    half = estimate(job(tiny_dir), store, "cuda").parts["frozen weights"]
    quarter = estimate(job(tiny_dir, quantization="4bit"), store, "cuda").parts["frozen weights"]
    assert half == whole / 2
    assert quarter < half


@pytest.mark.parametrize("stage", ["rm", "dpo", "orpo", "kto"])
def test_other_stages(stage: str, tiny_dir: Path, store: AdapterStore) -> None:
    asked = {key: value for key, value in SFT.items() if stage != "rm" or key != "golden"}
    found = estimate(load_job(tiny_dir, {**asked, "stage": stage, "batch_size": 4}), store, "cpu")
    assert found.moment in ("learning", "scoring")
    assert found.parts["activations, logits, cache"] > 0


def test_a_missing_base_model_is_an_error(tiny_dir: Path, tmp_path: Path, store: AdapterStore) -> None:
    config = job(tiny_dir).model_copy(update={"base_model": str(tmp_path)})
    with pytest.raises(ConfigError, match="base_model"):
        estimate(config, store, "cpu")


def test_the_report_names_settings_that_fit(
    tiny_dir: Path, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = job(tiny_dir, gradient_checkpointing=False)
    needed = estimate(asked, store, "cpu").total
    monkeypatch.setattr(module, "_there", lambda device: needed)
    assert not [line for line in report(asked, store, "cpu") if "fit" in line]
    monkeypatch.setattr(module, "_there", lambda device: needed - 1)
    assert report(asked, store, "cpu")[-1] == "it does not fit; it fits with gradient_checkpointing: true"
    monkeypatch.setattr(module, "_there", lambda device: 1)
    assert "no setting here helps" in report(asked, store, "cpu")[-1]
    monkeypatch.setattr(module, "_there", lambda device: 0)
    assert "no GPU here" in report(asked, store, "cuda")[-1]
