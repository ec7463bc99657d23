"""adapters/validate.py: every kind of adapter that must be refused, and those that must be accepted.

The rows follow the table of how stock vLLM treats each of them.
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters import InvalidAdapter, validate
from tests.adapters.changes import (
    A,
    B,
    Change,
    both,
    config,
    every,
    file,
    ones,
    only,
    provenance,
    ranks,
    raw_config,
    spoil,
    tensor,
    without,
)
from tests.adapters.folders import BASE, DOWN, GOLDEN, SCORE, Folder, Q, key, make_folder, pair, with_header

EMBEDDING = "base_model.model.model.embed_tokens.lora_embedding_A"

# Refused adapters, with part of the message
REFUSED: dict[str, tuple[Change, str]] = {
    "r of config below the tensors": (config(r=2), "with r 2"),
    "r of config above the tensors": (config(r=8), "with r 8"),
    "A and B of different ranks": (tensor(B, ones(8, 2)), r"A \[4, 8\] and B \[8, 2\]"),
    "rank_pattern says otherwise": (config(rank_pattern={"q_proj": 8}), "q_proj has A .* with r 8"),
    "weights changed after training": (provenance(weights_digest="0" * 64), "is not weights_digest of provenance.json"),
    "r missing": (without("r"), "r is None"),
    "r null": (config(r=None), "r is None"),
    "r 0": (config(r=0), "r is 0"),
    "r negative": (config(r=-1), "r is -1"),
    "r a text": (config(r="16"), "r is '16'"),
    "r a fraction": (config(r=1.5), "r is 1.5"),
    "r true": (config(r=True), "r is True"),
    "r 1e9": (config(r=10**9), "r is 1000000000"),
    "rank above max_lora_rank": (ranks(32), "above max_lora_rank 16: .*XINGLIN_MAX_LORA_RANK=32$"),
    "a rank no setting names": (ranks(17), "r is 17, above max_lora_rank 16: .*XINGLIN_MAX_LORA_RANK=32$"),
    "rank_pattern above max_lora_rank": (
        both(only(pair(Q, 33, 8, 8), pair(DOWN, 4, 16, 8)), config(rank_pattern={"down_proj": 4, "q_proj": 33})),
        "rank_pattern gives 'q_proj' rank 33, above max_lora_rank 16: .*XINGLIN_MAX_LORA_RANK=64$",
    ),
    "lora_alpha missing": (without("lora_alpha"), "lora_alpha is None"),
    "lora_alpha null": (config(lora_alpha=None), "lora_alpha is None"),
    "lora_alpha 0": (config(lora_alpha=0), "lora_alpha is 0"),
    "lora_alpha negative": (config(lora_alpha=-16), "lora_alpha is -16"),
    "lora_alpha that overflows": (config(lora_alpha=1e30), "lora_alpha is 1e.30"),
    "lora_alpha beyond a float": (config(lora_alpha=10**400), "lora_alpha is 1000"),
    "alpha_pattern that overflows": (config(alpha_pattern={"q_proj": 1e30}), "alpha_pattern must hold numbers"),
    "target_modules missing": (without("target_modules"), "target_modules is missing"),
    "target_modules empty": (config(target_modules=[]), "target_modules is missing"),
    "target_modules a number": (config(target_modules=5), "target_modules must be plain"),
    "IA3": (config(peft_type="IA3"), "peft_type is 'IA3'"),
    "DoRA": (config(use_dora=True), "DoRA cannot be served"),
    "DoRA undeclared": (tensor(f"base_model.model.{Q}.lora_magnitude_vector", ones(8)), "not PEFT LoRA weights"),
    "bias all": (config(bias="all"), "bias is 'all'"),
    "bias lora_only": (config(bias="lora_only"), "bias is 'lora_only'"),
    "lora_bias": (config(lora_bias=True), "LoRA bias cannot be served"),
    "lora_B.bias": (tensor(B.replace("weight", "bias"), ones(8)), "not PEFT LoRA weights.*lora_B.bias"),
    "aLoRA": (config(alora_invocation_tokens=[1, 2]), "Activated LoRA"),
    "layer replication": (config(layer_replication=[[0, 1]]), "layer replication"),
    "token embeddings": (config(trainable_token_indices=[1]), "token embeddings"),
    "bare parameters": (config(target_parameters=["experts"]), "bare parameters"),
    "KaSA": (config(kasa_config={"a": 1}), "KaSA"),
    "a setting of a later PEFT": (config(use_newest_trick=True), r"unknown settings.*\['use_newest_trick'\]"),
    "a setting of the engine": (config(vllm_lora_scaling_factor=9.0), "vllm_lora_scaling_factor"),
    "use_rslora a text": (config(use_rslora="false"), "use_rslora is 'false'"),
    "modules_to_save": (config(modules_to_save=["lm_head"]), "modules_to_save is .*whole modules"),
    "a whole lm_head": (tensor("base_model.model.lm_head.weight", ones(9, 8)), "not PEFT LoRA weights"),
    "a score head for chat": (tensor(SCORE, ones(1, 8)), "not PEFT LoRA weights.*score.weight"),
    "a score head to save for chat": (config(modules_to_save=["score"]), "whole modules cannot be served for chat"),
    "PiSSA": (config(init_lora_weights="pissa_niter_16"), "'pissa_niter_16'.*path_initial_model"),
    "OLoRA": (config(init_lora_weights="OLoRA"), "'OLoRA'.*also changes the base model"),
    "LoRA-GA": (config(init_lora_weights="lora_ga"), "'lora_ga'.*also changes the base model"),
    "no lora_A": (lambda f: f.tensors.pop(A), "both lora_A and lora_B.*q_proj has only lora_B"),
    "no lora_B": (lambda f: f.tensors.pop(B), "both lora_A and lora_B.*q_proj has only lora_A"),
    "A and B swapped": (both(tensor(A, ones(8, 4)), tensor(B, ones(4, 8))), "with r 4"),
    "1-D tensor": (tensor(A, ones(32)), r"lora_A.weight has shape \[32\]"),
    "0-D tensor": (tensor(A, np.float32(1).reshape(())), r"has shape \[\]"),
    "3-D tensor": (tensor(A, ones(1, 4, 8)), r"has shape \[1, 4, 8\]"),
    "a tensor of rank 0": (both(tensor(A, ones(0, 8)), tensor(B, ones(8, 0))), r"has shape \[0, 8\]"),
    "a smaller model's": (only(pair(Q, 4, 4, 4)), "q_proj maps 8 to 8 in tiny, but 4 to 4 in the adapter"),
    "a bigger model's": (only(pair(Q, 4, 16, 16)), "q_proj maps 8 to 8 in tiny, but 16 to 16 in the"),
    "wrong shape in the last layer only": (
        lambda f: f.tensors.update(pair(DOWN, 4, 16, 9)),
        "layers.1.mlp.down_proj maps 16 to 8 in tiny, but 16 to 9 in the adapter",
    ),
    "layers beyond the model": (
        lambda f: f.tensors.update(pair("model.layers.2.self_attn.q_proj", 4, 8, 8)),
        "tiny has no LoRA-capable modules with these names: model.layers.2",
    ),
    "unknown module": (lambda f: f.tensors.update(pair("model.layers.0.x", 4, 8, 8)), "no LoRA-capable.*layers.0.x"),
    "LoRA on lm_head": (lambda f: f.tensors.update(pair("lm_head", 4, 8, 9)), "no LoRA-capable.*lm_head"),
    "LoRA on embeddings": (tensor(EMBEDDING, ones(4, 9)), "not PEFT LoRA weights"),
    "vision prefix": (lambda f: f.tensors.update(pair("vision." + Q, 4, 8, 8)), "no LoRA-capable.*vision"),
    "doubled prefix": (lambda f: f.tensors.update(pair("model." + Q, 4, 8, 8)), "no LoRA-capable.*model.model"),
    "no prefix": (only({f"{Q}.lora_A.weight": ones(4, 8), f"{Q}.lora_B.weight": ones(8, 4)}), "not PEFT LoRA weights"),
    ".default. infix": (tensor(A.replace("weight", "default.weight"), ones(4, 8)), "not PEFT LoRA weights.*default"),
    "path in a tensor's name": (tensor(key("../../x", "A"), ones(4, 8)), "not PEFT LoRA weights"),
    "int8 tensors": (every(lambda a: np.ones_like(a, np.int8)), "not floats .*is I8"),
    "no tensors": (only({}), "no LoRA pairs"),
    "B is zero": (every(lambda a: a * (a.shape[1] != 4)), "every pair has an all-zero lora_A or lora_B"),
    "A is zero": (every(lambda a: a * (a.shape[1] == 4)), "every pair has an all-zero lora_A or lora_B"),
    "halves of different pairs are zero": (
        both(tensor(A, 0 * ones(4, 8)), tensor(key(DOWN, "B"), 0 * ones(8, 4))),
        "every pair has an all-zero lora_A or lora_B",
    ),
    "NaN": (spoil(math.nan), "NaN or infinity.*q_proj.lora_A"),
    "infinity": (spoil(-math.inf), "NaN or infinity"),
    "1e30": (spoil(1e30), r"beyond ±1000, .*q_proj.lora_A.weight' reaches 1e\+30"),
    "-1001": (spoil(-1001), "beyond ±1000"),
    "NaN in half precision": (both(spoil(math.nan), every(lambda a: a.astype(np.float16))), "NaN or infinity"),
    "truncated": (file("adapter_model.safetensors", with_header(b"{", b"")), "adapter_model.safetensors: .*JSON"),
    "empty file": (file("adapter_model.safetensors", b""), "adapter_model.safetensors: the file is truncated"),
    "garbage": (file("adapter_model.safetensors", b"garbage" * 99), "adapter_model.safetensors: "),
    "huge header": (file("adapter_model.safetensors", b"\xff" * 99), "adapter_model.safetensors: "),
    "pickle named safetensors": (file("adapter_model.safetensors", b"\x80\x04cos\nsystem\n."), "truncated or not a"),
    ".bin beside the safetensors": (file("adapter_model.bin", b""), "convert-adapter: 'adapter_model.bin'"),
    ".pt beside the safetensors": (file("adapter_model.pt", b""), "convert-adapter: 'adapter_model.pt'"),
    "new embeddings": (file("new_embeddings.safetensors", b""), "unexpected files.*'new_embeddings.safetensors'"),
    "code": (file("modeling_x.py", b""), "unexpected files.*'modeling_x.py'"),
    "another case": (file("Adapter_Config.json", b""), "unexpected files.*'Adapter_Config.json'"),
    "right-to-left name": (file("a\u202egnp.exe", b""), r"unexpected files.*'a\\u202egnp.exe'"),
    "config is not JSON": (raw_config("{"), "adapter_config.json cannot be read as JSON"),
    "config is not UTF-8": (file("adapter_config.json", b'{"r": "\xff"}'), "cannot be read as JSON"),
    "config a list": (raw_config("[]"), "adapter_config.json must be a JSON object"),
    "NaN literal": (raw_config('{"lora_alpha": NaN}'), "NaN is not a finite number"),
    "Infinity literal": (raw_config('{"lora_alpha": -Infinity}'), "-Infinity is not a finite number"),
    "1e999": (raw_config('{"lora_dropout": 1e999}'), "1e999 is not a finite number"),
    "duplicate keys": (raw_config('{"r": 4, "r": 8}'), "duplicate key"),
    "JSON 33 deep": (raw_config('{"r":' * 32 + "1" + "}" * 32), "nested deeper than 32"),
    "JSON 100k deep": (raw_config("[" * 100_000), "nested deeper than 32"),
    "JSON of 2 MiB": (raw_config(" " * (2 << 20) + "{}"), "larger than 1 MiB"),
    "an integer of 5000 digits": (raw_config('{"r": ' + "9" * 5000 + "}"), "cannot be read as JSON"),
    "regex in target_modules": (config(target_modules=r".*\.(q|k)_proj"), "target_modules must be plain"),
    "regex among target_modules": (config(target_modules=["q_proj", "(a+)+$"]), "target_modules must be plain"),
    "regex in exclude_modules": (config(exclude_modules="(a+)+$"), "exclude_modules must be plain"),
    "regex in layers_pattern": (config(layers_pattern=["(a+)+$"]), "layers_pattern must be plain"),
    "regex in rank_pattern": (config(rank_pattern={"(a+)+$": 4}), "rank_pattern must hold plain"),
    "regex in alpha_pattern": (config(alpha_pattern={".*q_proj": 4}), "alpha_pattern must hold plain"),
    "rank_pattern a list": (config(rank_pattern=[1]), "rank_pattern must be an object"),
    "rank_pattern of texts": (config(rank_pattern={"q_proj": "8"}), "rank_pattern must hold numbers"),
    "rank_pattern of 0": (config(rank_pattern={"q_proj": 0}), "rank_pattern must hold numbers"),
    "alpha_pattern of 0": (config(alpha_pattern={"q_proj": 0}), "alpha_pattern must hold numbers"),
    "5000 patterns": (config(rank_pattern={f"m{i}": 4 for i in range(5000)}), "at most 500 module names"),
    "another base": (
        provenance(base_model="llama", base_fingerprint="f" * 16),
        "trained on 'llama' with fingerprint 'f{16}', but this service runs tiny with fingerprint 0123456789abcdef",
    ),
    "unknown provenance": (provenance(author="me"), "provenance.json: 'author': "),
    "provenance without a stage": (lambda f: f.provenance.clear(), "provenance.json: 'stage': "),
    "a base model by its path": (provenance(base_model="/home/me/llama"), "provenance.json: 'base_model': "),
    "a terminal's escape for a stage": (provenance(stage="\x1b[2J"), "provenance.json: 'stage': "),
    "an empty stop string": (provenance(stop=["\n", ""]), "provenance.json: 'stop.1': "),
    "a stop string of 101 letters": (provenance(stop=["x" * 101]), "provenance.json: 'stop.0': "),
    "17 stop strings": (provenance(stop=["x"] * 17), "provenance.json: 'stop': "),
    "one string for stop": (provenance(stop="###"), "provenance.json: 'stop': "),
    "metrics of NaN": (file("provenance.json", b'{"stage":"sft","metrics":{"loss":NaN}}'), "provenance.json cannot be"),
    "a manifest of something else": (
        both(lambda f: setattr(f, "provenance", None), file("manifest.json", b'{"manifest_version": 3}')),
        "manifest.json: 'stage': ",
    ),
    "golden prompts torn": (file("golden.jsonl", b"{"), "golden.jsonl line 1: "),
    "chat template of 1 MiB": (file("chat_template.jinja", b" " * (1 << 20)), "larger than 256 KiB"),
    "chat template in Latin-1": (file("chat_template.jinja", b"\xe9"), "chat_template.jinja is not UTF-8"),
}  # fmt: skip


def problems_of(folder: Path, base: Any = BASE) -> list[str]:
    with pytest.raises(InvalidAdapter) as caught:
        validate(folder, base)
    for problem in caught.value.problems:
        assert str(folder.parent) not in problem
        assert problem.isprintable()
        assert len(problem) < 1000
    return caught.value.problems


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(adapter: Folder, change: Change, message: str) -> None:
    validate(adapter.write(), BASE)  # valid before the change
    change(adapter)
    problems = problems_of(adapter.write())
    assert any(re.search(message, problem) for problem in problems), problems


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(adapter: Folder, name: str) -> None:
    (adapter.write() / name).unlink()
    assert problems_of(adapter.path) == [f"{name} is missing"]


def test_folder_with_only_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    problems = problems_of(tmp_path / "x")
    assert (
        "only adapter_model.safetensors is read; other formats may run code when loaded, convert them with "
        "python -m training convert-adapter: 'adapter_model.bin'" in problems
    )
    assert "adapter_model.safetensors is missing" in problems


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "README.md", "provenance.json"]
)
@pytest.mark.parametrize(
    "special",
    [
        lambda path, real: path.symlink_to(real),
        lambda path, _: path.symlink_to("/etc/passwd"),
        lambda path, _: path.symlink_to("nowhere"),
        lambda path, _: os.mkfifo(path),  # opening it would block forever
        lambda path, _: path.mkdir(),
    ],
    ids=["link", "link away", "broken link", "fifo", "folder"],
)
def test_only_regular_files_are_opened(
    adapter: Folder, tmp_path: Path, name: str, special: Callable[[Path, Path], None]
) -> None:
    path = adapter.write() / name
    real = tmp_path / "elsewhere"
    if path.exists():
        path.rename(real)
    special(path, real)
    problems = problems_of(adapter.path)
    assert problems[0] == f"only regular files are allowed; links, folders or special files: '{name}'"


@pytest.mark.parametrize("where", ["nowhere", "adapter/adapter_config.json", "x" * 300, "a\0b"])
def test_missing_or_impossible_folder(adapter: Folder, tmp_path: Path, where: str) -> None:
    adapter.write()
    assert problems_of(tmp_path / where) == [
        "folder not found: give the folder that holds adapter_config.json"
    ]


def test_all_problems_are_reported_at_once(adapter: Folder) -> None:
    both(
        config(r=0, use_dora=True, bias="all", target_modules=".*"),
        lambda f: f.tensors.pop(B),
        lambda f: f.tensors.update(pair("lm_head", 4, 8, 9)),
        spoil(math.nan),
        provenance(base_fingerprint="f" * 16),
        file("golden.jsonl", b"{\n{"),
        file("evil.py", b""),
        file("chat_template.jinja", b"\xff"),
    )(adapter)
    problems = problems_of(adapter.write())
    for part in (
        "evil.py", "chat_template", "golden.jsonl line 1", "golden.jsonl line 2", "r is 0", "DoRA", "bias is",
        "target_modules", "both lora_A and lora_B", "lm_head", "NaN", "fingerprint",
    ):  # fmt: skip
        assert sum(part in problem for problem in problems) == 1, (part, problems)


def test_messages_stay_short_for_huge_inputs(adapter: Folder) -> None:
    adapter.tensors |= {key(f"m{i}" + "x" * 150, "A"): ones(4, 8) for i in range(2000)}
    adapter.tensors |= {f"n{i}" + "y" * 300: ones(1) for i in range(2000)}
    adapter.others |= {f"{i}" + "z" * 200: b"" for i in range(2000)}
    adapter.config |= {f"k{i}": 1 for i in range(2000)} | {"modules_to_save": ["m" * 9] * 2000}
    adapter.config["rank_pattern"] = {f"({i}": "no" for i in range(400)}
    adapter.provenance["data_digests"] = {f"f{i}": 0 for i in range(2000)}
    assert len("; ".join(problems_of(adapter.write()))) < 10_000


ACCEPTED: dict[str, Change] = {
    "as it is": lambda _: None,
    "bfloat16": every(lambda a: (a.view(np.uint32) >> 16).astype(np.uint16)),
    "float16": every(lambda a: a.astype(np.float16)),
    "float64": every(lambda a: a.astype(np.float64)),
    "rank at the limit": ranks(16),
    "rank 1": ranks(1),
    "rank_pattern": both(
        only(pair(Q, 2, 8, 8), pair(DOWN, 4, 16, 8)), config(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 4.5})
    ),
    "rank_pattern of one layer": both(
        only(pair(Q, 2, 8, 8), pair("model.layers.1.self_attn.q_proj", 4, 8, 8)),
        config(rank_pattern={"layers.0.self_attn.q_proj": 2}),
    ),
    "rank_pattern, first match wins": both(
        only(pair(Q, 2, 8, 8), pair(DOWN, 4, 16, 8)), config(rank_pattern={"self_attn.q_proj": 2, "q_proj": 4})
    ),
    "rank_pattern of part of a name matches nothing": config(rank_pattern={"proj": 2}),
    "rank_pattern null": config(rank_pattern=None, alpha_pattern=None),
    "rsLoRA": config(use_rslora=True),
    "fewer layers": only(pair(Q, 4, 8, 8)),
    "target_modules of one text": config(target_modules="q_proj"),
    "target_modules all-linear": config(target_modules="all-linear"),
    "target_modules by path": config(target_modules=["model.layers.0.self_attn.q_proj"]),
    "init that leaves the base alone": config(init_lora_weights="gaussian"),
    "init false": config(init_lora_weights=False),
    "zero in one of the pairs": tensor(A, 0 * ones(4, 8)),
    "settings of old PEFT": without("bias", "task_type", "peft_type"),
    "what trainers leave": both(*(file(name, b"x") for name in ("README.md", "tokenizer.json", "training_args.bin"))),
    "chat template": file("chat_template.jinja", "{{ '医' }}".encode()),
    "golden prompts": lambda f: f.golden.append(GOLDEN),
    "no provenance": lambda f: setattr(f, "provenance", None),
    "provenance without a fingerprint": provenance(base_fingerprint=None),
    "a base model of the hub": provenance(base_model="Qwen/Qwen3-8B"),
    "stop strings": provenance(stop=["\n\n", "患者：" * 33, *"###"]),
    "notes in any script": provenance(notes="由张医生审核 👩‍⚕️", data_digests={"问诊.jsonl": "0" * 64}),
}  # fmt: skip


@pytest.mark.parametrize("change", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_accepted(adapter: Folder, change: Change) -> None:
    change(adapter)
    adapter.write()
    validate(adapter.path, BASE)
    validate(adapter.path)


def test_the_facts(adapter: Folder) -> None:
    adapter.golden = [GOLDEN, GOLDEN]
    adapter.others = {"README.md": b"", "chat_template.jinja": b""}
    facts = validate(adapter.write(), BASE)
    assert (facts.r, facts.lora_alpha, facts.golden_prompts) == (4, 8.0, 2)
    assert facts.target_modules == ["down_proj", "q_proj"]
    assert facts.files == ["adapter_model.safetensors", "chat_template.jinja", "golden.jsonl"]
    assert facts.provenance.model_dump(exclude_defaults=True) == adapter.provenance


def test_without_a_base_model_shapes_and_rank_are_not_checked(adapter: Folder) -> None:
    both(only(pair("any.module", 64, 5, 6)), config(r=64))(adapter)
    assert validate(adapter.write()).r == 64
    assert len(problems_of(adapter.path)) == 2  # rank and module


def test_a_rank_within_a_larger_limit_is_accepted(adapter: Folder) -> None:
    ranks(32)(adapter)
    validate(adapter.write(), replace(BASE, max_lora_rank=32))


def test_adapter_without_provenance_is_external(adapter: Folder) -> None:
    adapter.provenance = None
    facts = validate(adapter.write(), BASE)
    assert facts.provenance.stage == "external"
    assert facts.config["base_model_name_or_path"] is None  # a host path must not leak


# Reward adapters


def test_reward_adapter_with_score_head(reward: Folder) -> None:
    facts = validate(reward.write(), BASE)
    assert facts.provenance.task == "reward"
    assert facts.config["modules_to_save"] == ["classifier", "score"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.tensors.pop(SCORE), "score.weight is missing"),
        (config(modules_to_save=["score", "lm_head"]), "may save only its score head"),
        (config(modules_to_save="score"), "may save only its score head"),
        (tensor(SCORE, ones(1, 8) * math.nan), "NaN or infinity.*score"),
        (tensor(SCORE, np.ones((1, 8), np.int8)), "not floats.*score"),
        (tensor("base_model.model.v_head.weight", ones(1, 8)), "not PEFT LoRA weights.*v_head"),
        (provenance(task="chat"), "whole modules cannot be served for chat"),
    ],
)
def test_refused_reward_adapters(reward: Folder, change: Change, message: str) -> None:
    change(reward)
    problems = problems_of(reward.write())
    assert any(re.search(message, problem) for problem in problems), problems


def test_the_unchanged_folder_is_valid(tmp_path: Path) -> None:
    """Guard of this file: if the unchanged folder were refused, every refusal above would mean nothing."""
    validate(make_folder(tmp_path / "x").write(), BASE)
