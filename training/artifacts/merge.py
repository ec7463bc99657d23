"""Merges adapters into their base model, which any loader can read, or exports one as a plain PEFT folder.

The arithmetic is in float32, whatever the base model's dtype. Peak memory is about 6 bytes per parameter of a base
model in bfloat16 (50 GB for 8 billion).
"""

import json
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.utils import GENERATION_CONFIG_NAME

from adapters import (
    PROVENANCE_FILE,
    AdapterRef,
    AdapterStore,
    InvalidAdapter,
    Provenance,
    fingerprint,
    strict_json,
)
from adapters.durable import sha256
from adapters.manifest import MANIFEST_FILE, Dtype, Manifest
from adapters.validate import CONFIG_FILE, TEMPLATE_FILE, TENSOR_FILE
from training.artifacts.peft_folder import (
    PREFIX,
    SCORE,
    PeftAdapter,
    inject,
    listed,
    new_folder,
    read_adapter,
    read_template,
)
from training.errors import ConfigError
from training.models.base_model import base_folder, base_name, load_scorer
from training.models.remote_code import own_code_refused
from training.tokens.stop_tokens import Stops, find_stops, model_stops

log = logging.getLogger(__name__)

MERGE_FILE = "xinglin_merge.json"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", TEMPLATE_FILE,
)  # fmt: skip
_BESIDE = (GENERATION_CONFIG_NAME, "LICENSE", "LICENSE.txt", "NOTICE")


@dataclass(frozen=True)
class _Given:
    """One adapter to merge, with its provenance."""

    ref: str
    """`name@revision`, or the name of its folder."""
    adapter: PeftAdapter
    base_fingerprint: str | None
    digest: str
    """SHA-256 of the tensor file."""
    template: str | None
    stops: Stops
    """Stop tokens and strings, besides the base model's own."""
    tokenizer: Path | None
    """The folder of its own tokenizer, if it has one with embeddings for it."""


def merge(
    base_model: str,
    adapters: Sequence[str],
    target: Path,
    store: AdapterStore,
    *,
    dtype: Dtype | None = None,
    any_base: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Merge all `adapters` into the base model, first to last, and write it to the new folder `target`.

    An adapter is a ref of the store or a folder (`./doctor`: anything with a slash). The merged model takes over a
    folder's trained embeddings, tokenizer, biases and chat template; if two adapters have the same, the last one wins.
    A reward adapter makes the result a reward model. `dtype`: of the saved weights; None keeps the base model's.
    `any_base` also merges an adapter with another base fingerprint, such as one trained on an earlier merge with a
    larger vocabulary. `trust_remote_code` runs the Python code that comes with the base model, and copies it.

    The adapters' stop tokens become the model's own; stop strings cannot be stored in a base model: logs a warning.

    Raises ConfigError (base model not found or its code not trusted, adapter of another base model, target exists),
    AdapterError. `target` does not exist then.
    """
    folder = base_folder(base_model, trust_remote_code=trust_remote_code)
    name = base_name(base_model)
    base_fingerprint = fingerprint(folder)
    with new_folder(target) as partial:
        given = [_read(text, store) for text in adapters]
        is_reward = _check(given, name, base_fingerprint, any_base)
        with own_code_refused(f"base model {name}", "give --trust-remote-code"):
            model = _load(folder, is_reward, trust_remote_code)
        was_tied = model.config.tie_word_embeddings
        saved_in = {parameter: value.dtype for parameter, value in model.named_parameters()}
        usual = model.dtype
        for value in model.parameters():
            value.data = value.data.float()
        steps = []
        for number, one in enumerate(given, start=1):
            log.info("merging %s (%d of %d)", one.ref, number, len(given))
            model, scales = _apply(model, one, name)
            steps.append(
                {
                    "ref": one.ref,
                    "tensors_sha256": one.digest,
                    "base_fingerprint": one.base_fingerprint,
                    "scales": scales,
                    "replaced": sorted(one.adapter.whole),
                }
            )
        if was_tied:
            _tie_if_equal(model)
        for parameter, value in model.named_parameters():
            value.data = value.data.to(getattr(torch, dtype) if dtype else saved_in.get(parameter, usual))
        log.info("saving the model")
        _save(model, partial, folder, given, trust_remote_code)
        record = {
            "base_model": name,
            "base_fingerprint": base_fingerprint,
            "task": "reward" if is_reward else "chat",
            "dtype": str(model.dtype).removeprefix("torch."),
            "adapters": steps,
        }
        (partial / MERGE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def export_adapter(adapter: str, target: Path, store: AdapterStore) -> None:
    """Export a published adapter to the new folder `target` as PEFT would save it: config, tensors, chat template.

    Raises ConfigError (target exists), AdapterError (no such adapter).
    """
    manifest = store.get(AdapterRef.parse(adapter))
    with store.hold(manifest), new_folder(target) as partial:
        folder = store.verify(manifest)
        for file in (CONFIG_FILE, TENSOR_FILE, TEMPLATE_FILE):
            if file in manifest.files:
                shutil.copyfile(folder / file, partial / file)


def _read(text: str, store: AdapterStore) -> _Given:
    if _is_ref(text, store):
        manifest = store.get(AdapterRef.parse(text))
        with store.hold(manifest):
            return _given(manifest.ref, store.verify(manifest), manifest)
    folder = Path(text)
    adapter = _given(folder.resolve().name, folder, _provenance(folder))
    embeds = any(_is_vocabulary(name) for name in adapter.adapter.whole)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    return replace(adapter, tokenizer=folder if embeds and has_tokenizer else None)


def _is_ref(text: str, store: AdapterStore) -> bool:
    """Return whether `text` is a ref of the store. `org/name` is a folder if that folder exists."""
    if "/" not in text:
        return text not in (".", "..")
    return not Path(text).exists() and text.partition("@")[0] in store.names()


def _given(ref: str, folder: Path, facts: Provenance) -> _Given:
    adapter = read_adapter(folder)
    return _Given(
        ref=ref,
        adapter=replace(adapter, is_reward=adapter.is_reward or facts.task == "reward"),
        base_fingerprint=facts.base_fingerprint,
        digest=sha256(adapter.file),
        template=read_template(folder),
        stops=Stops(tuple(facts.stop_token_ids), tuple(facts.stop)),
        tokenizer=None,
    )


def _provenance(folder: Path) -> Provenance:
    for file, kind in ((PROVENANCE_FILE, Provenance), (MANIFEST_FILE, Manifest)):
        if (folder / file).is_file():
            try:
                return kind.model_validate(strict_json.loads((folder / file).read_bytes()))
            except ValueError as error:
                raise InvalidAdapter([f"{file} cannot be read: fix or remove it"]) from error
    return Provenance(stage="external")


def _check(given: Sequence[_Given], base: str, base_fingerprint: str, any_base: bool) -> bool:
    """Check the base fingerprints and return whether the result is a reward model. Raises ConfigError."""
    for one in given:
        if one.base_fingerprint is None:
            log.info("%s has no base fingerprint: only names and shapes are checked", one.ref)
        elif one.base_fingerprint != base_fingerprint and not any_base:
            raise ConfigError(
                f"{one.ref} was trained on a base model with fingerprint {one.base_fingerprint}, and {base} has "
                f"{base_fingerprint}: give that base model, or --any-base if this one was made from it"
            )
    rewards = [one.ref for one in given if one.adapter.is_reward]
    if len(rewards) > 1:
        raise ConfigError(
            f"only one reward adapter can be merged, as a model has one score head: {', '.join(rewards)}"
        )
    return bool(rewards)


def _load(folder: Path, is_reward: bool, trust: bool) -> Any:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)  # fail before the work, not after
    if getattr(config, "quantization_config", None):
        raise ConfigError(
            f"base_model: {folder.name} is quantised, so a merge would not be exact: give the unquantised model"
        )
    if is_reward:
        return load_scorer(folder, num_labels=1, dtype="auto", trust_remote_code=trust)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust)


def _apply(model: Any, given: _Given, base: str) -> tuple[Any, list[float]]:
    """Merge one adapter; return the model and the scales of the adapter's pairs."""
    lora, whole = given.adapter.lora, given.adapter.whole
    _make_room(model, given)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unfit = [
        f"{name} is {list(tensor.shape)}"
        for name, tensor in whole.items()
        if name not in parameters or parameters[name].shape != tensor.shape
    ]
    broken = [name for name, tensor in {**lora, **whole}.items() if not torch.isfinite(tensor).all()]
    problems = [
        *listed(f"{given.ref}: these tensors are not in {base}, or have another shape there: ", unfit),
        *listed(f"{given.ref}: these tensors contain NaN or infinity: ", broken),
    ]
    if given.adapter.is_reward and SCORE not in whole:
        problems.append(f"{given.ref}: {SCORE} is missing: a reward adapter needs a score head")
    if problems:
        raise InvalidAdapter(problems)
    for name, tensor in whole.items():
        parameters[name].data = tensor.float()
    peft_model = inject(model, given.adapter, base)
    state = {PREFIX + name: tensor.float() for name, tensor in lora.items()}
    set_peft_model_state_dict(peft_model, state, low_cpu_mem_usage=True)
    layers = [module for module in peft_model.modules() if isinstance(module, LoraLayer)]
    scales = sorted({scale for layer in layers for scale in layer.scaling.values()})
    return peft_model.merge_and_unload(), scales


def _is_vocabulary(name: str) -> bool:
    return (
        re.fullmatch(r"(.+\.)?(embed_tokens|word_embeddings|wte|embed_in|lm_head|embed_out)(\..+)?", name)
        is not None
    )


def _make_room(model: Any, given: _Given) -> None:
    """Resize the model's embeddings to the adapter's, and untie them from the head if the adapter changes either."""
    whole = given.adapter.whole
    touched = [name for name in (*given.adapter.lora, *whole) if _is_vocabulary(name)]
    if not touched:
        return
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    rows = {len(whole[name]) for name in touched if name in whole}
    if rows - {inputs.num_embeddings}:
        if given.tokenizer is None:
            raise InvalidAdapter(
                [
                    f"{given.ref} has another vocabulary than the base model, but its folder has no tokenizer for it"
                ]
            )
        if len(rows) > 1 or (outputs is not None and len([name for name in touched if name in whole]) < 2):
            raise InvalidAdapter(
                [f"{given.ref} changes the vocabulary size, but not of both embeddings and head: {touched}"]
            )
        model.resize_token_embeddings(*rows, mean_resizing=False)
    if outputs is not None and model.config.tie_word_embeddings:
        outputs = model.get_output_embeddings()
        outputs.weight = torch.nn.Parameter(outputs.weight.detach().clone())
        model.config.tie_word_embeddings = False


def _tie_if_equal(model: Any) -> None:
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if outputs is not None and torch.equal(inputs.weight, outputs.weight):
        model.config.tie_word_embeddings = True
        model.tie_weights()


def _save(model: Any, target: Path, base: Path, given: Sequence[_Given], trust: bool) -> None:
    model.save_pretrained(target, max_shard_size="4GB")
    tokenizer_folder = next((one.tokenizer for one in reversed(given) if one.tokenizer), base)
    _copy(_TOKENIZER_FILES, tokenizer_folder, target)
    _copy(_BESIDE, base, target)
    if trust:
        _copy([file.name for file in base.glob("*.py")], base, target)
    template = next((one.template for one in reversed(given) if one.template), None)
    if template is not None:
        (target / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    elif not (target / TEMPLATE_FILE).exists():
        _copy((TEMPLATE_FILE,), base, target)
    tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=trust)
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise InvalidAdapter(
            [f"the tokenizer has {len(tokenizer)} tokens, but the model has only {rows} embeddings"]
        )
    asked = next((one.stops for one in reversed(given) if one.stops != Stops() or one.template), Stops())
    stops = find_stops(target, model.config, tokenizer, asked.texts, asked.token_ids)
    generation = target / GENERATION_CONFIG_NAME
    more = set(stops.token_ids) - {*model_stops(target, model.config), tokenizer.eos_token_id}
    if more and generation.is_file():  # as text: transformers refuses to save many files that it reads
        settings = json.loads(generation.read_text(encoding="utf-8")) | {
            "eos_token_id": list(stops.token_ids)
        }
        generation.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    warn_of_stop_texts(stops.texts)
    if model.config.pad_token_id is None:  # without one, a reward model cannot score a batch
        model.config.pad_token_id = tokenizer.pad_token_id
        model.config.save_pretrained(target)


def warn_of_stop_texts(texts: Sequence[str]) -> None:
    """Log the stop strings that a base model cannot store: engines read only stop tokens from it."""
    if texts:
        log.warning(
            "a base model cannot store stop strings, here %s: send them as `stop` with each request, and set "
            "the same `chat_template` in jobs on this base model",
            ", ".join(map(repr, texts)),
        )


def _copy(names: Sequence[str], source: Path, target: Path) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
