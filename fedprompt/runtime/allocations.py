"""Counts the bytes of the tensors that PyTorch makes, on any device.

`torch.cuda.max_memory_allocated` does so for GPUs only, and only for tensors that are really made
there. Here PyTorch's dispatcher reports the result of every operation, in forward and backward
passes. Memory that a kernel needs for itself while it runs is not seen.
"""

from __future__ import annotations

import weakref
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts while it is active: `with Allocations() as made: ...`.

    Tensors that exist already, and views of them, are not counted.

    Attributes:
        now: bytes of the counted tensors that still exist.
        peak: the largest value of `now` so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        # By the identity of a storage: whether it is counted. A storage that is seen as an
        # argument before any operation has returned it is older than this object.
        self._known: dict[int, bool] = {}

    def __enter__(self) -> Self:
        """Count from now on."""
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        """Count no further tensors; the end of those counted is still noticed."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and count the memory of its results."""
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._see(tensor, new=False)
        results = func(*args, **kwargs)
        for tensor in _tensors(results):
            self._see(tensor, new=True)
        return results

    def added(self, size: int) -> None:
        """Count `size` new bytes; a subclass may refuse them by raising an error."""
        self.now += size
        self.peak = max(self.peak, self.now)

    def _see(self, tensor: Tensor, *, new: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        if new:
            self.added(size)
        self._known[key] = new
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        if self._known.pop(key, False):
            self.now -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
