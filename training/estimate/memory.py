"""Counts the current and peak memory of tensors as they are created and freed.

With FakeTensorMode, whose tensors have shapes but no contents, it can run a training step in seconds that would not fit
into this machine, operation by operation as the model does.
"""

import weakref
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Counts the bytes of every tensor created while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        """Bytes of live tensors."""
        self.peak = 0
        """The highest value of `held`."""
        self._known: dict[int, weakref.ref[UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._enter(value.untyped_storage())
        return out

    def _enter(self, storage: UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:  # a view or an in-place operation
            return

        def leave(_: object) -> None:
            del self._known[key]
            self.held -= size

        self._known[key] = weakref.ref(storage, leave)
        self.held += size
        self.peak = max(self.peak, self.held)
