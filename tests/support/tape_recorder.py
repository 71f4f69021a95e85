"""A recorder of local steps that needs no GPU: it repeats operations as a CUDA graph does kernels.

A tape holds the operations of a computation with the very tensors that they read and wrote. A
replay runs them again in their order and runs no Python of the computation. So what Python decided
while the tape was made, and the tensors that it read, stay as they were, as on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fedprompt.runtime.step_recorder import RecordingError

_WAITING = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "is_nonzero"}
"""Operations for whose result the host would wait, which stops the recording of a CUDA graph."""

Result = TypeVar("Result")


class TapeRecorder:
    """A `StepRecorder` for CPUs.

    Attributes:
        tapes: the recordings.
    """

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def record(self, compute: Callable[[], Result]) -> Callable[[], Result]:
        """As `StepRecorder.record`."""
        with watched():
            compute()
        tape = Tape()
        with _OneHotOfCuda(), tape:
            result = compute()
        self.tapes.append(tape)

        def replay() -> Result:
            tape.replay()
            return result

        return replay


class Tape(TorchDispatchMode):
    """The operations of a computation.

    Attributes:
        replays: how often they were repeated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.replays = 0
        self._operations: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in _WAITING:
            raise RecordingError(f"{name} waits for the device")
        result = func(*args, **kwargs)
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        # A view of memory that stays where it is needs no repetition.
        if not aliases or any(alias.is_write for alias in aliases):
            # What is written in place is written again; anything else is copied to its place.
            made = [] if aliases else [t for t in tree_iter(result) if isinstance(t, Tensor)]
            self._operations.append((func, args, kwargs, made))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat all operations on what their tensors hold now."""
        self.replays += 1
        for func, args, kwargs, made in self._operations:
            again = [t for t in tree_iter(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for tensor, value in zip(made, again, strict=False):
                tensor.copy_(value)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Compute as while a tape is made: PyTorch chooses some kernels differently then."""
    with _OneHotOfCuda(), _Passive():
        yield


class _Passive(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _OneHotOfCuda(TorchFunctionMode):
    """On a CPU, `one_hot` waits for its labels to check them; on CUDA it does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.one_hot:
            return func(*args, **(kwargs or {}))
        labels, classes = args
        return torch.zeros(*labels.shape, classes, dtype=labels.dtype).scatter_(
            -1, labels[..., None], 1
        )
