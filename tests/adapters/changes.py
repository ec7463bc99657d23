"""Changes to an adapter folder, for tables of valid and invalid ones."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.adapters.folders import DOWN, Folder, Q, key, pair

Change = Callable[[Folder], Any]
A, B = key(Q, "A"), key(Q, "B")


def config(**changes: Any) -> Change:
    return lambda folder: folder.config.update(changes)


def without(*keys: str) -> Change:
    return lambda folder: [folder.config.pop(key) for key in keys]


def tensor(name: str, array: Any) -> Change:
    return lambda folder: folder.tensors.update({name: array})


def only(*tensors: dict[str, np.ndarray]) -> Change:
    def change(folder: Folder) -> None:
        folder.tensors = {name: array for some in tensors for name, array in some.items()}

    return change


def spoil(value: float) -> Change:
    def change(folder: Folder) -> None:
        folder.tensors[A][1, 2] = value

    return change


def file(name: str, content: bytes) -> Change:
    return lambda folder: folder.others.update({name: content})


def raw_config(text: str) -> Change:
    return file("adapter_config.json", text.encode())


def provenance(**changes: Any) -> Change:
    return lambda folder: folder.provenance.update(changes)


def every(function: Callable[[np.ndarray], np.ndarray]) -> Change:
    def change(folder: Folder) -> None:
        folder.tensors = {name: function(array) for name, array in folder.tensors.items()}

    return change


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def ranks(r: int) -> Change:
    return both(only(pair(Q, r, 8, 8), pair(DOWN, r, 16, 8)), config(r=r))
