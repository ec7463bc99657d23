"""Writes the result of a run: an adapter folder with golden prompts and provenance, ready to publish."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor
from transformers.integrations import is_deepspeed_zero3_enabled

from adapters import GOLDEN_FILE, PROVENANCE_FILE, Provenance, Rounding, write_golden
from adapters.durable import sha256
from adapters.validate import TEMPLATE_FILE, TENSOR_FILE
from training.artifacts.merge import warn_of_stop_texts
from training.artifacts.new_base import merge_adapter
from training.config import AdapterJob
from training.data import Row
from training.models.base_model import Base
from training.models.golden import golden_prompts, provable, rounding
from training.models.lora import adapted, release
from training.runs import processes
from training.runs.inputs import read_inputs
from training.runs.run import Run

log = logging.getLogger(__name__)

_RESULT, _UNMERGED, _ROLLOUTS = "result", "unmerged", "rollouts"
_ROLLOUTS_PROVED_BY = 2


def golden_rows(rows: list[Row], base: Base, config: AdapterJob) -> list[Row]:
    """Return the `rows` that can become golden prompts. Call it before training, which may take hours.

    Raises DataError if there are none and the result needs some.
    """
    if config.makes_base:
        return []
    return provable(rows, base.tokenizer, base.positions, config.golden.max_new_tokens)


def write_result(
    model: Any, base: Base, config: AdapterJob, run: Run, *, rows: list[Row], metrics: dict[str, float]
) -> Path:
    """Write the adapter `default` of a PeftModel, with golden prompts from the chats in `rows`.

    With `merge: true`, write the base model with the adapter merged in. A quantised model or one to merge is released
    from memory.
    """
    if config.merge:
        return _write_merged(model, base, config, run, metrics)
    result = _write_weights(model, base, run)
    if config.quantization:
        release(model)
        processes.led(lambda: None)  # the other processes wait until it is written
        model = adapted(base, result)
    golden = config.golden
    if processes.leads():
        log.info(
            "%s: writing %d golden prompts, with which a server proves the adapter",
            config.name,
            golden.prompts,
        )
    # In every process: with sharded weights, a forward pass needs all of them.
    prompts = golden_prompts(
        model, base.tokenizer, rows, golden.prompts, golden.max_new_tokens, stops=base.stops.token_ids
    )
    if processes.leads():
        write_golden(result / GOLDEN_FILE, prompts)
    dtype = _dtype(model)
    moved = None if _is_sharded(model) else rounding(model, prompts)
    _write_provenance(dtype, base, config, run, metrics, task="chat", moved=moved)
    return result


def write_base(model: Any, base: Base, config: AdapterJob, run: Run, *, metrics: dict[str, float]) -> Path:
    """Write a fully trained model in the base model's dtype, with its tokenizer."""
    result = run.folder / _RESULT
    dtype = base.config().dtype or model.dtype
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    names = [name for name in model.state_dict() if name not in tied]
    with _whole(model, names) as weights:
        model.config.dtype = dtype
        model.save_pretrained(
            result,
            state_dict={name: weight.to(dtype) for name, weight in weights.items()},
            is_main_process=processes.leads(),
        )
    if processes.leads():
        base.tokenizer.save_pretrained(result)
        warn_of_stop_texts(base.stops.texts)
    _write_provenance(_dtype(model), base, config, run, metrics, task="chat")
    return result


def _write_merged(model: Any, base: Base, config: AdapterJob, run: Run, metrics: dict[str, float]) -> Path:
    if processes.leads():
        shutil.rmtree(run.folder / _UNMERGED, ignore_errors=True)  # may be left by a killed run
    adapter = _write_weights(model, base, run, _UNMERGED)
    _write_provenance(_dtype(model), base, config, run, metrics, task="chat", folder=_UNMERGED)
    if config.added_tokens and processes.leads():
        base.tokenizer.save_pretrained(adapter)
    release(model)
    processes.led(lambda: merge_adapter(adapter, run.folder / _RESULT, base, config, run.store))
    return run.folder / _RESULT


def write_reward_adapter(
    model: Any, base: Base, config: AdapterJob, run: Run, *, metrics: dict[str, float]
) -> Path:
    """Write the reward adapter `default` of a PeftModel, with its score head."""
    result = _write_weights(model, base, run)
    _write_provenance(_dtype(model), base, config, run, metrics, task="reward")
    return result


def write_for_rollouts(model: Any, base: Base, config: AdapterJob, run: Run, *, rows: list[Row]) -> Path:
    """Write the current adapter `default` for a rollout service, with golden prompts from a few of `rows`."""
    folder = _write_weights(model, base, run, _ROLLOUTS)
    prompts = golden_prompts(
        model,
        base.tokenizer,
        rows,
        _ROLLOUTS_PROVED_BY,
        config.golden.max_new_tokens,
        stops=base.stops.token_ids,
    )
    write_golden(folder / GOLDEN_FILE, prompts)
    provenance = Provenance(
        stage=config.stage,
        base_model=base.name,
        base_fingerprint=base.fingerprint,
        dtype=_dtype(model),
        stop_token_ids=list(
            base.stops.token_ids
        ),  # no stop strings: in a rollout, an answer ends with a stop token
        run_id=run.id,
    )
    text = provenance.model_dump_json(indent=2) + "\n"
    (folder / PROVENANCE_FILE).write_text(text, encoding="utf-8")
    return folder


def _write_weights(model: Any, base: Base, run: Run, folder: str = _RESULT) -> Path:
    result = run.folder / folder
    if base.template is not None and processes.leads():
        result.mkdir(exist_ok=True)
        (result / TEMPLATE_FILE).write_text(base.template, encoding="utf-8")
    learnt = [name for name in model.state_dict() if ".default." in name]
    with _whole(model, learnt) as weights:
        # Only `default`: some trainers keep a copy beside it as the reference model.
        model.save_pretrained(
            result,
            selected_adapters=["default"],
            save_embedding_layers=False,
            state_dict=weights,
            is_main_process=processes.leads(),
        )
    return result


@contextmanager
def _whole(model: Any, names: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the model's weights of these names, gathered from the shards of all processes."""
    state = model.state_dict()
    learnt = {name: state[name] for name in names}
    if is_deepspeed_zero3_enabled():
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        with import_module("deepspeed").zero.GatheredParameters(weights):
            yield learnt
    else:
        yield {
            name: weight.full_tensor() if isinstance(weight, DTensor) else weight
            for name, weight in learnt.items()
        }


def _is_sharded(model: Any) -> bool:
    """Return whether the model's weights are sharded over several processes."""
    return is_deepspeed_zero3_enabled() or any(isinstance(weight, DTensor) for weight in model.parameters())


def _write_provenance(
    dtype: Any,
    base: Base,
    config: AdapterJob,
    run: Run,
    metrics: dict[str, float],
    task: Any,
    folder: str = _RESULT,
    moved: Rounding | None = None,
) -> None:
    if not processes.leads():
        return
    inputs = read_inputs(run.folder)
    weights = run.folder / folder / TENSOR_FILE
    provenance = Provenance(
        stage=config.stage,
        task=task,
        base_model=base.name,
        base_fingerprint=base.fingerprint,
        dtype=dtype,
        rounding=moved,
        weights_digest=sha256(weights) if weights.exists() else None,
        stop=list(base.stops.texts),
        stop_token_ids=list(base.stops.token_ids),
        parent=config.starts_from,  # resolved to its revision when the run started
        run_id=run.id,
        data_digests={Path(path).name: digest for path, digest in inputs.files.items()},
        changed_inputs=inputs.changed,
        metrics=metrics,
        licence=config.licence,
        notes=config.notes,
    )
    text = provenance.model_dump_json(indent=2) + "\n"
    (run.folder / folder / PROVENANCE_FILE).write_text(text, encoding="utf-8")


def _dtype(model: Any) -> Any:
    return str(model.dtype).removeprefix("torch.")
