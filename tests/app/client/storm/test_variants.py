"""A variant is another revision with the same function to the last bit."""

import io
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest

from adapters import AdapterRef, AdapterStore
from adapters.tensors import read_header
from app.client.storm.variants import Original, find_originals, variant
from tests.adapters.folders import BASE, DOWN, GOLDEN, Q, key, make_folder


def _bits_of_bfloat16(array: np.ndarray) -> np.ndarray:
    return (array.view(np.uint32) >> 16).astype(np.uint16)


_DTYPES = {
    "F64": lambda array: array.astype(np.float64),
    "F32": lambda array: array,
    "F16": lambda array: array.astype(np.float16),
    "BF16": _bits_of_bfloat16,
}


def _original(store: AdapterStore, folder: Path, dtype: str = "F32") -> Original:
    made = make_folder(folder)
    made.tensors = {name: _DTYPES[dtype](array) for name, array in made.tensors.items()}
    made.golden = [GOLDEN]
    manifest = store.publish(made.write(), "doctor", actor="test")
    return Original(manifest, store.folder("doctor", manifest.revision))


def _unpacked(content: bytes, folder: Path) -> Path:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    """Return values by name; bfloat16 converted to float32."""
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    found = {}
    for name, spec in read_header(path).items():
        dtype = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}[spec.dtype]
        values = np.frombuffer(content[spec.begin : spec.end], dtype).reshape(spec.shape)
        found[name] = (values.astype(np.uint32) << 16).view(np.float32) if spec.dtype == "BF16" else values
    return found


@pytest.mark.parametrize("dtype", _DTYPES)
def test_other_bytes_and_the_same_products(dtype: str, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    original = _original(store, tmp_path / "folder", dtype)
    chance = random.Random(0)
    folders = [_unpacked(variant(original, chance), tmp_path / f"variant-{number}") for number in range(5)]
    manifests = [store.publish(folder, "storm-0", actor="test", base=BASE) for folder in folders]
    assert len({manifest.revision for manifest in manifests} - {original.manifest.revision}) == 5

    first = _tensors(original.folder)
    x = np.random.default_rng(1).normal(size=16).astype(first[key(Q, "A")].dtype)
    for folder in folders:
        tensors = _tensors(folder)
        for module in (Q, DOWN):
            a, b = tensors[key(module, "A")], tensors[key(module, "B")]
            a0, b0 = first[key(module, "A")], first[key(module, "B")]
            assert np.array_equal(np.abs(a), np.abs(a0))
            assert np.array_equal(b @ a, b0 @ a0)
            given = x[: a.shape[1]]
            assert np.array_equal(b @ (a @ given), b0 @ (a0 @ given))


def test_provenance_names_the_original(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    original = _original(store, tmp_path / "folder")
    folder = _unpacked(variant(original, random.Random(0)), tmp_path / "variant")
    manifest = store.publish(folder, "storm-0", actor="test", base=BASE)
    assert manifest.parent == original.ref
    assert manifest.base_fingerprint == BASE.fingerprint
    assert manifest.golden_prompts == 1


def test_originals_are_of_this_base_model_and_have_golden_prompts(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    pointed = _original(store, tmp_path / "folder").manifest
    store.set_alias("doctor", "default", pointed.revision, actor="test")
    store.publish(make_folder(tmp_path / "unproven", seed=1).write(), "leaflet", actor="test")
    later = make_folder(tmp_path / "later", seed=2)
    later.golden = [GOLDEN]
    newest = store.publish(later.write(), "doctor", actor="test")
    store.publish(later.path, "storm-0", actor="test")

    found = [original.manifest for original in find_originals(store, BASE.fingerprint)]
    assert found == [store.get(AdapterRef("doctor", revision=one.revision)) for one in (pointed, newest)]
    assert not list(find_originals(store, "another"))
