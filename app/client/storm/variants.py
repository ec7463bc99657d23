"""Any number of revisions with equal answers: different bytes, the same function to the last bit.

For some ranks of each LoRA pair, the row of A and the column of B change their sign. This changes one bit per value and
is exact in every number format; each product of the two stays the same, and so does every sum of products. Golden
prompts stay valid, and the answers of such a revision are known in advance.
"""

import io
import random
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapters import (
    DEFAULT_ALIAS,
    GOLDEN_FILE,
    PROVENANCE_FILE,
    AdapterError,
    AdapterStore,
    Manifest,
    Provenance,
    read_golden,
)
from adapters.tensors import TensorSpec, read_header

NAME = "storm-"
"""Prefix of all adapter names made here."""

_TENSOR_FILE = "adapter_model.safetensors"
_SIGN_BIT = {
    "F64": ("<u8", 1 << 63),
    "F32": ("<u4", 1 << 31),
    "F16": ("<u2", 1 << 15),
    "BF16": ("<u2", 1 << 15),
}
_A, _B = "lora_A.weight", "lora_B.weight"


@dataclass(frozen=True)
class Original:
    """A published revision to make variants of."""

    manifest: Manifest
    folder: Path

    @property
    def ref(self) -> str:
        """`name@revision`"""
        return self.manifest.ref

    def prompts(self) -> list[list[dict[str, str]]]:
        """Return the messages of its golden prompts."""
        return [prompt.messages for prompt in read_golden(self.folder / GOLDEN_FILE)]


def find_originals(store: AdapterStore, base_fingerprint: str) -> Iterator[Original]:
    """Yield chat revisions of this base model with golden prompts: those of `default` first, then the newest."""
    found = []
    for name in store.names():
        if name.startswith(NAME):
            continue
        default = store.aliases(name).get(DEFAULT_ALIAS)
        for manifest in _readable(store, name):
            fits = manifest.base_fingerprint == base_fingerprint and manifest.task == "chat"
            if fits and manifest.golden_prompts:
                found.append((manifest.revision == default, manifest.created_at, manifest))
    for _, _, manifest in sorted(found, key=lambda one: one[:2], reverse=True):
        yield Original(manifest, store.folder(manifest.name, manifest.revision))


def _readable(store: AdapterStore, name: str) -> list[Manifest]:
    try:
        return store.revisions(name)
    except AdapterError:  # damaged or pruned meanwhile: use others
        return []


def variant(original: Original, chance: random.Random) -> bytes:
    """Return a tar of a new revision with the same answers as `original`. Raises OSError, BadTensors."""
    tensors = original.folder / _TENSOR_FILE
    content = bytearray(tensors.read_bytes())
    flip_signs(content, read_header(tensors), chance)
    manifest = original.manifest
    provenance = Provenance(**manifest.model_dump(include=set(Provenance.model_fields))).model_copy(
        update={
            "parent": original.ref,
            "notes": "Made by swap-storm; its answers equal its parent's.",
            "weights_digest": None,  # the parent's does not match
        }
    )
    files = {file: (original.folder / file).read_bytes() for file in manifest.files}
    files |= {PROVENANCE_FILE: provenance.model_dump_json().encode(), _TENSOR_FILE: bytes(content)}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for file, its_content in files.items():
            member = tarfile.TarInfo(file)
            member.size = len(its_content)
            archive.addfile(member, io.BytesIO(its_content))
    return packed.getvalue()


def flip_signs(content: bytearray, specs: dict[str, TensorSpec], chance: random.Random) -> None:
    """Flip the sign of random ranks, each with probability 0.5, of each pair in the bytes of a safetensors file."""
    for name, a in specs.items():
        if not name.endswith(_A):
            continue
        b = specs[name.removesuffix(_A) + _B]
        ranks = np.array([chance.random() < 0.5 for _ in range(a.shape[0])])
        _flip(content, a, ranks[:, None])
        _flip(content, b, ranks[None, :])


def _flip(
    content: bytearray, spec: TensorSpec, where: "np.ndarray[tuple[int, int], np.dtype[np.bool_]]"
) -> None:
    dtype, sign = _SIGN_BIT[spec.dtype]
    bits = np.frombuffer(content, dtype, offset=spec.begin, count=spec.shape[0] * spec.shape[1])
    bits = bits.reshape(spec.shape)
    bits ^= where.astype(dtype) * np.array(sign, dtype)
