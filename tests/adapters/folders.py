"""Adapter folders built by hand, so that tests can corrupt any part."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adapters import AdapterStore, BaseModelFacts, GoldenPrompt

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SCORE = "base_model.model.score.weight"
BASE = BaseModelFacts(
    name="tiny",
    fingerprint="0123456789abcdef",
    module_shapes={
        f"model.layers.{layer}.{module}": shape
        for layer in (0, 1)
        for module, shape in {"self_attn.q_proj": (8, 8), "mlp.down_proj": (16, 8)}.items()
    },
    max_lora_rank=16,
)
GOLDEN = GoldenPrompt(
    messages=[{"role": "user", "content": "头痛怎么办?"}],
    prompt_token_ids=[1, 2],
    token_ids=[3],
    logprobs=[-0.1],
    base_logprobs=[-2.0],
)
NAME, WHO = "doctor", "test"
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "int8": "I8", "uint16": "BF16"}


def key(module: str, half: str) -> str:
    """Return the name under which PEFT saves lora_A or lora_B of a module."""
    return f"base_model.model.{module}.lora_{half}.weight"


def pair(module: str, r: int, into: int, out: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the two tensors of one module."""
    random = np.random.default_rng(seed)
    shapes = {key(module, "A"): (r, into), key(module, "B"): (out, r)}
    return {name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


@dataclass
class Folder:
    """The content of an adapter folder, to change and then write."""

    path: Path
    config: Any
    tensors: dict[str, np.ndarray]
    provenance: dict[str, Any] | None
    golden: list[GoldenPrompt] = field(default_factory=list)
    others: dict[str, bytes] = field(default_factory=dict)
    """Further files; they replace generated ones of the same name."""

    def write(self) -> Path:
        """Write the folder, replacing an existing one."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()
        files = {
            "adapter_config.json": json.dumps(self.config).encode(),
            "adapter_model.safetensors": safetensors(self.tensors),
        }
        if self.provenance is not None:
            files["provenance.json"] = json.dumps(self.provenance).encode()
        if self.golden:
            files["golden.jsonl"] = "".join(p.model_dump_json() + "\n" for p in self.golden).encode()
        for name, content in (files | self.others).items():
            (self.path / name).write_bytes(content)
            (self.path / name).chmod(0o600)  # as safetensors does
        return self.path


def safetensors(tensors: dict[str, np.ndarray], metadata: Any = None) -> bytes:
    """Return the bytes of a safetensors file. A uint16 array is written as bfloat16 bits."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, array in tensors.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": _DTYPES[str(array.dtype)], "shape": array.shape, "data_offsets": offsets}
        data += array.tobytes()
    return with_header(json.dumps(header).encode(), data)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    """Return a safetensors file with this header."""
    return len(header).to_bytes(8, "little") + header + data


def make_folder(path: Path, seed: int = 0) -> Folder:
    """Return a valid folder of rank 4 on two modules; the weights depend on `seed`."""
    return Folder(
        path=path,
        config={
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "down_proj"],
            "bias": "none",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "/home/somebody/models/tiny",
        },
        tensors=pair(Q, 4, 8, 8, seed) | pair(DOWN, 4, 16, 8, seed),
        provenance={
            "stage": "sft",
            "base_model": "tiny",
            "base_fingerprint": BASE.fingerprint,
            "run_id": "2026-01-31-a",
            "metrics": {"eval_loss": 0.5},
        },
    )


def publish(store: AdapterStore, folder: Path, seed: int) -> str:
    """Publish an adapter with the weights of `seed`; return its revision."""
    return store.publish(make_folder(folder / f"seed-{seed}", seed).write(), NAME, actor=WHO).revision


def left_in_staging(store: AdapterStore) -> list[str]:
    """Return the staging folders of running and killed publications."""
    return [path.name for path in (store.root / ".staging").glob("[!.]*")]
