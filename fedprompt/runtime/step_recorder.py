"""Recording the kernels of a computation once and starting all of them with one call: CUDA graphs.

A local step of prompt learning starts hundreds of small kernels, and starting them takes longer
than computing them. A graph starts them all at once. It repeats the same kernels on the same
memory: nothing that Python decided while it was recorded is decided again.

No test runs on a GPU; `scripts/gpu_check.py` checks `CudaRecorder` on one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

WARM_UP = 2
"""Calls before one that is watched and one that is recorded. Libraries allocate their workspaces,
and caches fill; PyTorch's documentation advises three."""

Result = TypeVar("Result")


class RecordingError(Exception):
    """A computation cannot be recorded; the text says why."""


class StepRecorder(Protocol):
    """Records computations."""

    def record(self, compute: Callable[[], Result]) -> Callable[[], Result]:
        """Record the kernels that a function starts.

        Args:
            compute: a pure function that reads its input from tensors which stay where they are.

        Returns:
            A function that starts the same kernels on what these tensors hold now. Its result has
            the same tensors in every call.

        Raises:
            RecordingError: the function waits for the device, or does something else that cannot
                be recorded.
        """


class CudaRecorder:
    """Records CUDA graphs.

    All graphs use the same memory for what they compute, so a result is lost when another graph is
    replayed.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def record(self, compute: Callable[[], Result]) -> Callable[[], Result]:
        """As `StepRecorder.record`."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # The graph reads tensors by their addresses, and their owners may drop them.
        read = self._warm_up(compute)
        graph, reason = torch.cuda.CUDAGraph(), ""
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                try:
                    result = compute()
                except RuntimeError as error:
                    # The end of the failed recording raises as well, and knows less of its cause.
                    reason = " ".join(str(error).split())
                    raise
        except RuntimeError as error:
            reason = reason or " ".join(str(error).split())
        if reason:
            raise RecordingError(f"recording failed ({reason})")

        def replay() -> Result:
            assert read is not None
            graph.replay()
            return result

        return replay

    def _warm_up(self, compute: Callable[[], Any]) -> list[Tensor]:
        """Call a function some times on a stream of its own; return what it reads."""
        stream, now = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        stream.wait_stream(now)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                compute()
            # Not while the graph is recorded: PyTorch chooses some kernels differently while
            # operations are watched, and a replay would have other last bits than a plain step.
            with ReadFrom() as read:
                compute()
        now.wait_stream(stream)
        tensors: list[Tensor] = read.tensors
        return tensors


class ReadFrom(TorchDispatchMode):
    """Collects the tensors that exist before a computation and that it reads.

    Attributes:
        tensors: these tensors, one per storage.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors: list[Tensor] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what an operation reads, and that what it returns did not exist before."""
        kwargs = kwargs or {}
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, Tensor) and self._is_new(tensor):
                self.tensors.append(tensor)
        result = func(*args, **kwargs)
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._is_new(tensor)
        return result

    def _is_new(self, tensor: Tensor) -> bool:
        """Whether a storage is met for the first time; what was computed is not kept in memory."""
        # An address of the computation's own memory is never that of a tensor from before.
        address = tensor.untyped_storage().data_ptr()
        new = address not in self._known
        self._known.add(address)
        return new


def step_recorder(device: torch.device, wanted: bool) -> StepRecorder | None:
    """What records the local steps of a run; None if steps are not recorded.

    Args:
        device: the device of the backbone.
        wanted: `backbone.cuda_graphs`.
    """
    return CudaRecorder(device) if wanted and device.type == "cuda" else None
