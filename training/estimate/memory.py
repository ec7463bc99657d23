"""Memory that tensors hold and held at most, counted as they come and go.

With tensors of shapes and no contents (FakeTensorMode) a training step can be gone through that would not fit
here, in seconds, and operation by operation as its model does it.
"""

import weakref
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Counts the bytes of every tensor made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        """Bytes in tensors that are alive."""
        self.peak = 0
        """The most that was held at one time."""
        self._known: dict[int, weakref.ref[UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._enter(value.untyped_storage())
        return out

    def _enter(self, storage: UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:  # a view, or written in place
            return

        def leave(_: object) -> None:
            del self._known[key]
            self.held -= size

        self._known[key] = weakref.ref(storage, leave)
        self.held += size
        self.peak = max(self.peak, self.held)
