"""Read safetensors files without torch: the header and the largest magnitude of each tensor.

Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, a JSON header, the data).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adapters import strict_json
from adapters.errors import shown

_MAX_HEADER_BYTES = 16 << 20
_MAX_DIMENSIONS = 8
_MAX_NUMBER = 1 << 48  # makes the product of a hostile shape cheap
_PIECE_BYTES = 16 << 20
_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
READABLE = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class BadTensors(ValueError):
    """The file is truncated or not a valid safetensors file."""


@dataclass(frozen=True)
class TensorSpec:
    """One header entry. `begin` and `end` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Return all tensors of a safetensors file by name; check that they fill the file without gap or overlap.

    Raises BadTensors, OSError.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise BadTensors("the file is truncated or not a safetensors file")
        try:
            header = strict_json.loads(file.read(length))
        except ValueError as error:
            raise BadTensors(f"the header cannot be read as JSON: {str(error)[:200]}") from error
    if not isinstance(header, dict):
        raise BadTensors("the header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadTensors("__metadata__ is not an object of strings")
    start = 8 + length
    specs = [_spec(name, entry, start) for name, entry in header.items()]
    reached = start
    for spec in sorted(specs, key=lambda spec: (spec.begin, spec.end)):
        if spec.begin != reached:
            raise BadTensors(f"tensor {shown(spec.name)} does not start where the previous one ends")
        reached = spec.end
    if reached != size:
        raise BadTensors("the file is truncated, or has bytes that belong to no tensor")
    return {spec.name: spec for spec in specs}


def _spec(name: str, entry: Any, start: int) -> TensorSpec:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        is_proper = (
            dtype in _ITEM_BYTES
            and len(shape) <= _MAX_DIMENSIONS
            and all(type(number) is int and 0 <= number < _MAX_NUMBER for number in (*shape, begin, end))
        )
    except (KeyError, TypeError, ValueError):
        is_proper = False
    if not is_proper:
        raise BadTensors(f"tensor {shown(name)} has an invalid dtype, shape or data_offsets")
    if end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise BadTensors(
            f"tensor {shown(name)} has {end - begin} bytes, which do not match its shape and dtype"
        )
    return TensorSpec(name, dtype, shape, start + begin, start + end)


def read_peaks(path: Path, specs: Iterable[TensorSpec]) -> Iterator[tuple[TensorSpec, float]]:
    """Yield the largest magnitude of each tensor of a READABLE dtype; not finite if any value is not.

    Reads in pieces to save memory, and without mmap, with which a file truncated meanwhile would kill the process.
    Raises BadTensors, OSError.
    """
    with path.open("rb") as file:
        for spec in specs:
            peak = 0.0
            file.seek(spec.begin)
            for begin in range(spec.begin, spec.end, _PIECE_BYTES):
                expected = min(_PIECE_BYTES, spec.end - begin)
                piece = file.read(expected)
                if len(piece) != expected:
                    raise BadTensors("the file was truncated while it was read")
                values = np.frombuffer(piece, READABLE[spec.dtype])
                if spec.dtype == "BF16":  # the upper half of a float32
                    values = (values.astype(np.uint32) << 16).view(np.float32)
                peak = float(np.maximum(peak, np.max(np.abs(values))))  # unlike max(), keeps a NaN
            yield spec, peak
