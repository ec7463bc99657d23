"""Every kind of adapter that must not be served is refused over HTTP without side effects."""

import json
import math
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters import AdapterStore
from tests.adapters.changes import (
    A,
    B,
    Change,
    both,
    config,
    every,
    file,
    ones,
    provenance,
    raw_config,
    tensor,
)
from tests.adapters.folders import Folder, Q, pair
from tests.adapters.test_validate import EMBEDDING, REFUSED
from tests.app.spoilt import Unharmed, demo_folder, listing, publish
from tests.service import Service

R, HIDDEN, MLP, VOCABULARY = 16, 192, 512, 2048
CASES_BETWEEN_LOOKS = 20


def added(*tensors: dict[str, np.ndarray]) -> Change:
    return lambda folder: [folder.tensors.update(some) for some in tensors]


def all_zero(half: str) -> Change:
    return lambda folder: folder.tensors.update(
        {name: 0 * array for name, array in folder.tensors.items() if f"lora_{half}" in name}
    )


def alternately_zero(folder: Folder) -> None:
    for name, array in folder.tensors.items():
        if ("layers.0" in name) == ("lora_A" in name):
            folder.tensors[name] = 0 * array


def of_another_size(hidden: int, mlp: int) -> Change:
    """Tensors as if trained on a model with the same modules but other widths."""

    def size(old: int) -> int:
        return {HIDDEN: hidden, MLP: mlp, 64: hidden // 3}.get(old, old)

    def change(folder: Folder) -> None:
        folder.tensors = {
            name: np.full([size(n) for n in array.shape], 0.01, np.float32)
            for name, array in folder.tensors.items()
        }

    return change


def of_rank(r: int) -> Change:
    """Every pair and the config with another rank."""

    def change(folder: Folder) -> None:
        folder.config["r"] = r
        for name, array in folder.tensors.items():
            axis = 0 if "lora_A" in name else 1
            folder.tensors[name] = np.repeat(array, -(-r // R), axis).take(range(r), axis)

    return change


def renamed(change: Callable[[str], str]) -> Change:
    def rename(folder: Folder) -> None:
        folder.tensors = {change(name): array for name, array in folder.tensors.items()}

    return rename


# Rows whose shapes are those of the small model there, in the demo's own
ADAPTED: dict[str, Change] = {
    "A and B of different ranks": tensor(B, ones(HIDDEN, 2)),
    "rank above max_lora_rank": of_rank(32),
    "a rank no setting names": of_rank(17),
    "rank_pattern above max_lora_rank": both(
        added(pair(Q, 33, HIDDEN, HIDDEN)), config(rank_pattern={"layers.0.self_attn.q_proj": 33})
    ),
    "DoRA undeclared": tensor(f"base_model.model.{Q}.lora_magnitude_vector", ones(HIDDEN)),
    "lora_B.bias": tensor(B.replace("weight", "bias"), ones(HIDDEN)),
    "a whole lm_head": tensor("base_model.model.lm_head.weight", ones(VOCABULARY, HIDDEN)),
    "A and B swapped": both(tensor(A, ones(HIDDEN, R)), tensor(B, ones(R, HIDDEN))),
    "1-D tensor": tensor(A, ones(R * HIDDEN)),
    "3-D tensor": tensor(A, ones(1, R, HIDDEN)),
    "a tensor of rank 0": both(tensor(A, ones(0, HIDDEN)), tensor(B, ones(HIDDEN, 0))),
    "a smaller model's": of_another_size(96, 256),
    "a bigger model's": of_another_size(384, 1024),
    "wrong shape in the last layer only": added(pair("model.layers.2.mlp.down_proj", R, MLP, HIDDEN + 1)),
    "layers beyond the model": added(pair("model.layers.3.self_attn.q_proj", R, HIDDEN, HIDDEN)),
    "unknown module": added(pair("model.layers.0.x", R, HIDDEN, HIDDEN)),
    "LoRA on lm_head": added(pair("lm_head", R, HIDDEN, VOCABULARY)),
    "LoRA on embeddings": tensor(EMBEDDING, ones(R, VOCABULARY)),
    "vision prefix": renamed(lambda name: name.replace("base_model.model.", "base_model.model.vision.")),
    "doubled prefix": renamed(lambda name: name.replace("base_model.model.", "base_model.model.model.")),
    "no prefix": renamed(lambda name: name.removeprefix("base_model.model.")),
    ".default. infix": renamed(lambda name: name.replace(".weight", ".default.weight")),
    "path in a tensor's name": added(pair("../../x", R, HIDDEN, HIDDEN)),
    "B is zero": all_zero("B"),
    "A is zero": all_zero("A"),
    "halves of different pairs are zero": alternately_zero,
}

# What only this service, or only HTTP, can be asked
MORE: dict[str, Change] = {
    "all but the first byte of the weights": lambda f: cut(f, -1),
    "half of the weights": lambda f: cut(f, 300_000),
    "nothing but the header's length": lambda f: cut(f, 8),
    "header of 2^63 bytes": file("adapter_model.safetensors", (1 << 63).to_bytes(8, "little") + b"{}"),
    "JSON of 20 MiB": raw_config(" " * (20 << 20) + "{}"),
    "JSON 1M deep": raw_config('{"r":' * (1 << 20)),
    "lora_alpha NaN": raw_config('{"peft_type": "LORA", "r": 16, "lora_alpha": NaN}'),
    "a key twice in provenance": file("provenance.json", b'{"stage": "sft", "stage": "pt"}'),
    "a bomb in target_modules": config(target_modules="(a+)+$" + "a" * 5000),
    "bombs among target_modules": config(target_modules=[f"(.*)*{n}$" for n in range(200)]),
    "a bomb in rank_pattern": config(rank_pattern={"(q|q|q_proj)*" * 50 + "$": 16}),
    "a bomb in alpha_pattern": config(alpha_pattern={"^(([a-z])+.)+[A-Z]([a-z])+$": 16}),
    "50k patterns": config(rank_pattern={f"m{n}": 16 for n in range(50_000)}),
    "5000 target_modules": config(target_modules=[f"m{n}" for n in range(5000)]),
    "of another base": provenance(base_fingerprint="0" * 16),
    "1e38 everywhere": every(lambda a: np.full_like(a, 1e38)),
    "one NaN in the last tensor": lambda f: poison(f, math.nan),
    "one infinity in the last tensor": lambda f: poison(f, math.inf),
    "bool tensors": lambda f: f.others.update(
        {"adapter_model.safetensors": b'\x4c\0\0\0\0\0\0\0{"%s":{"dtype":"BOOL","shape":[1],"data_offsets":[0,1]}}'}
    ),
}  # fmt: skip


def cut(folder: Folder, length: int) -> None:
    weights = (folder.path / "adapter_model.safetensors").read_bytes()
    folder.others["adapter_model.safetensors"] = weights[:length]


def poison(folder: Folder, value: float) -> None:
    name = [*folder.tensors][-1]
    array = folder.tensors[name].copy()
    array[-1, -1] = value
    folder.tensors[name] = array


INVALID = {name: ADAPTED.get(name, change) for name, (change, _) in REFUSED.items()} | MORE


def layers_swapped(folder: Folder) -> None:
    swap = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
    folder.tensors = {
        next((name.replace(old, new) for old, new in swap.items() if old in name), name): array
        for name, array in folder.tensors.items()
    }


def only_the_first_layer(folder: Folder) -> None:
    folder.tensors = {name: array for name, array in folder.tensors.items() if "layers.0." in name}


def of_another_name(folder: Folder) -> None:
    store = AdapterStore(folder.path.parents[1] / "store")
    folder.tensors = demo_folder(folder.path, store, "leaflet").tensors


def golden(**changes: Callable[[Any], Any]) -> Change:
    def change(folder: Folder) -> None:
        folder.golden = [
            prompt.model_copy(update={name: how(getattr(prompt, name)) for name, how in changes.items()})
            for prompt in folder.golden
        ]

    return change


# What every name, shape and number allows, and only the proof finds out; part of the message
UNPROVEN: dict[str, tuple[Change, str]] = {
    "lora_alpha doubled": (config(lora_alpha=64), "lora_alpha"),
    "rsLoRA that was none": (config(use_rslora=True), "use_rslora"),
    "alpha_pattern of one module": (config(alpha_pattern={"q_proj": 160}), "alpha_pattern"),
    "layers swapped": (layers_swapped, "weights"),
    "only the first layer": (only_the_first_layer, "layers or modules are missing"),
    "the weights of another adapter": (of_another_name, "does not answer as it did in training"),
    "weights of 900": (every(lambda a: np.full_like(a, 900)), "proof"),
    "int-like noise": (every(lambda a: np.round(a * 8).astype(np.float32)), "do not belong together"),
    "golden prompts of another adapter": (golden(logprobs=lambda found: [-9.0 for _ in found]), "not belong together"),
    "golden prompts of another base": (golden(base_logprobs=lambda found: [one - 1 for one in found]), "base model"),
    "golden prompts of another template": (golden(prompt_token_ids=lambda found: found[2:]), "chat template"),
    "golden prompts of another vocabulary": (golden(token_ids=lambda found: [10**9 for _ in found]), "proof"),
}  # fmt: skip


@pytest.fixture(scope="module")
def store(service: Service) -> AdapterStore:
    return AdapterStore(service.data_dir / "store")


@pytest.fixture(scope="module")
def looks(service: Service) -> Iterator[list[Unharmed]]:
    """The state of the service before the first test; compared again after every twenty tests and the last."""
    found = [Unharmed.of(service, "xinglin-demo", "doctor")]
    assert found[0].engine_starts == 1
    yield found
    assert Unharmed.of(service, "xinglin-demo", "doctor") == found[0]


@pytest.fixture
def unharmed(service: Service, looks: list[Unharmed]) -> Iterator[None]:
    yield
    looks.append(looks[0])
    if len(looks) % CASES_BETWEEN_LOOKS == 0:
        assert Unharmed.of(service, "xinglin-demo", "doctor") == looks[0]


@pytest.fixture
def folder(service: Service, store: AdapterStore, unharmed: None) -> Iterator[Folder]:
    """A valid folder to damage. If the alias moves, the test fails, and the alias is restored for the others."""
    before = store.aliases("doctor")["default"]
    path = service.data_dir / "incoming" / "spoilt"
    path.parent.mkdir(exist_ok=True)
    sound = demo_folder(path, store)
    sound.write()
    yield sound
    if store.aliases("doctor")["default"] != before:
        service.call("PUT", "/v1/adapters/doctor/aliases/default", {"revision": before})


def refused(service: Service, path: Path, *, may_be_kept: bool = False) -> dict[str, Any]:
    """Publish a folder that must be refused, check for side effects, and return the error."""
    but = ("incoming", "store/doctor") if may_be_kept else ("incoming",)
    before, files = service.adapters(), listing(service.data_dir, *but)
    status, reply = publish(service, path, alias="default")
    assert 400 <= status < 500, reply
    assert str(service.data_dir) not in json.dumps(reply)
    after = service.adapters()
    assert after["doctor@default"] | {"last_error": None} == before["doctor@default"] | {"last_error": None}
    assert after["engine"]["held"] == before["engine"]["held"]
    assert listing(service.data_dir, *but) == files
    assert not [*(service.data_dir / "store" / ".staging").glob("[!.]*")]
    error: dict[str, Any] = reply["error"]
    return error


@pytest.mark.parametrize("change", INVALID.values(), ids=INVALID.keys())
def test_invalid_adapters_are_refused(service: Service, folder: Folder, change: Change) -> None:
    change(folder)
    error = refused(service, folder.write())
    assert error["code"] == "invalid_adapter"
    assert error["problems"]
    assert all(isinstance(problem, str) and len(problem) < 1000 for problem in error["problems"])


@pytest.mark.parametrize(("change", "told"), UNPROVEN.values(), ids=UNPROVEN.keys())
def test_adapters_that_fail_their_proof_are_refused(
    service: Service, folder: Folder, change: Change, told: str
) -> None:
    change(folder)
    error = refused(service, folder.write(), may_be_kept=True)
    assert error["code"] in ("proof_failed", "adapter_refused")
    assert told in error["message"]


def test_an_unchanged_folder_is_accepted(service: Service, folder: Folder) -> None:
    """Guard this file: if the unchanged folder were refused, the other refusals would prove nothing."""
    status, reply = publish(service, folder.path, alias=None)
    assert status == 200, reply


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        short = Path("/proc/self/cwd") / path.name  # a socket's name may have at most 107 bytes
        before = Path.cwd()
        os.chdir(path.parent)
        try:
            made.bind(str(short))
        finally:
            os.chdir(before)


SPECIAL: dict[str, Callable[[Path], Any]] = {
    "fifo": os.mkfifo,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link away": lambda path: path.symlink_to("/etc/passwd"),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "socket": socket_at,
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "golden.jsonl", "notes.md"]
)
@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL.keys())
def test_special_files_are_never_opened(
    service: Service, folder: Folder, name: str, make: Callable[[Path], Any]
) -> None:
    (folder.path / name).unlink(missing_ok=True)
    make(folder.path / name)
    error = refused(service, folder.path)
    assert name in error["message"]


@pytest.mark.parametrize("is_beside", [True, False])
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pkl"])
def test_a_pickle_is_never_read(
    service: Service, folder: Folder, tmp_path: Path, is_beside: bool, name: str
) -> None:
    pwned = tmp_path / "pwned"
    (folder.path / name).write_bytes(f"cposix\nsystem\n(S'touch {pwned}'\ntR.".encode())
    if not is_beside:
        (folder.path / "adapter_model.safetensors").unlink()
    assert name in " ".join(refused(service, folder.path)["problems"])
    assert not pwned.exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file(service: Service, folder: Folder, name: str) -> None:
    (folder.path / name).unlink()
    assert refused(service, folder.path)["problems"] == [f"{name} is missing"]


def test_an_empty_folder(service: Service, folder: Folder) -> None:
    for path in folder.path.iterdir():
        path.unlink()
    assert refused(service, folder.path)["problems"]


def test_an_adapter_without_golden_prompts_is_not_served(service: Service, folder: Folder) -> None:
    folder.golden = []
    error = refused(service, folder.write(), may_be_kept=True)
    assert "golden.jsonl" in error["message"]
