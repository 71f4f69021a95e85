"""Local steps that are recorded once and then replayed; `backbone.cuda_graphs`.

A recording repeats the same kernels on the same memory. So everything that differs between steps
lies in buffers that stay where they are and are written before each replay: the trained tensors,
what the server sent, the clients' counts, and the images, labels and mask of the batch. A recording
serves all steps whose tensors have the same shapes, in all rounds and for all clients.

What a step decides in Python is decided once and for all. A step that reads the number of the step
or round, the learning rate or a client's id, or that draws, therefore stops the recording; a method
whose step depends on values in another way says so by `Method.no_graph_reason`. Such methods train
by plain steps. The optimiser's own step is not recorded, as it knows the learning rate.

Shape suffix: A clients that are still training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Batch, Method, RoundInfo, Tensors
from fedprompt.methods.parts.local_step import Computed, LocalStep, new_leaves
from fedprompt.runtime.step_recorder import RecordingError, StepRecorder

log = logging.getLogger("fedprompt.training")

MOST = 32
"""Recordings of a run. Each takes time and memory, and one that is used once gains nothing."""
BESIDES = ("labels", "mask", "second view", "second statistics")
"""The tensors of a batch that are no columns of its `Inputs`, in the order of `_of_batch`."""
_ENOUGH = f"steps of {MOST} shapes are recorded already; those of other shapes are plain"

Shapes = tuple[tuple[str, torch.Size, torch.dtype], ...]


class StepGraphs:
    """The recordings of one method.

    Args:
        method: the method.
        recorder: makes the recordings.

    Attributes:
        refused: why no step is recorded; None as long as nothing speaks against it.
        recorded: the number of recordings.
    """

    def __init__(self, method: Method, recorder: StepRecorder) -> None:
        self.refused = method.no_graph_reason
        self.recorded = 0
        self._method, self._recorder = method, recorder
        self._told = False
        self._steps: dict[Shapes, _RecordedStep] = {}

    def step(self, start: Tensors, fixed: Tensors, round_info: RoundInfo) -> LocalStep:
        """What computes the steps in which the same A clients train.

        Args:
            start: the trained tensors (A, ...) before the first of these steps.
            fixed: tensors (A, ...) that are used and not changed.
            round_info: the round of these A clients.

        Returns:
            The step. It may be one that was returned before, so that one can be used at a time.
        """
        key = _shapes(start | fixed | _of_round(round_info))
        if self.refused is not None:
            self._tell(self.refused)
        elif key not in self._steps and self.recorded == MOST:
            self._tell(_ENOUGH)
        else:
            return self._recorded(key, start, fixed, round_info)
        return LocalStep(self._method, new_leaves(start), fixed)

    def _recorded(
        self, key: Shapes, start: Tensors, fixed: Tensors, round_info: RoundInfo
    ) -> _RecordedStep:
        if key not in self._steps:
            self._steps[key] = _RecordedStep(self, self._method, start, fixed, round_info)
        step = self._steps[key]
        step.begin(start, fixed, round_info)
        return step

    def record(self, compute: Callable[[], Computed]) -> Callable[[], Computed] | None:
        """Record a step; None if it cannot be recorded, or if there are enough recordings."""
        if self.refused is not None:
            return None
        if self.recorded == MOST:
            self._tell(_ENOUGH)
            return None
        try:
            replay = self._recorder.record(compute)
        except RecordingError as error:
            self.refused = str(error)
        else:
            self.recorded += 1
            return replay
        self._tell(self.refused)
        return None

    def clear(self) -> None:
        """Drop all recordings and their memory."""
        self._steps.clear()
        self.recorded = 0

    def _tell(self, reason: str) -> None:
        """Log once why steps are not replayed."""
        if not self._told:
            name = self._method.name
            log.warning("method '%s': plain steps despite backbone.cuda_graphs: %s", name, reason)
        self._told = True


class _RecordedStep(LocalStep):
    """Steps of A clients from buffers of one shape; one recording per shape of a batch."""

    def __init__(
        self,
        graphs: StepGraphs,
        method: Method,
        start: Tensors,
        fixed: Tensors,
        round_info: RoundInfo,
    ) -> None:
        self._fixed = {name: torch.empty_like(value) for name, value in fixed.items()}
        super().__init__(method, new_leaves(start), self._fixed)
        self._graphs = graphs
        self._round = {n: torch.empty_like(v) for n, v in _of_round(round_info).items()}
        self._round_info = _steady(round_info, self._round)
        self._recordings: dict[Shapes, _Recording | None] = {}

    def begin(self, start: Tensors, fixed: Tensors, round_info: RoundInfo) -> None:
        """Write what does not change within these steps into the buffers."""
        _write(self.leaves | self._fixed | self._round, start | fixed | _of_round(round_info))

    def __call__(self, batch: Batch) -> Computed:
        """Compute one step, by a recording if there can be one."""
        tensors = _of_batch(batch)
        key = _shapes(tensors)
        if key not in self._recordings:
            self._recordings[key] = self._record(tensors)
        recording = self._recordings[key]
        if recording is None:
            return super().__call__(batch)
        _write(recording.buffers, tensors)
        return recording.replay()

    def _record(self, tensors: Tensors) -> _Recording | None:
        buffers = {name: value.clone() for name, value in tensors.items()}
        columns = {n: v for n, v in buffers.items() if n not in BESIDES}
        steady = Batch(
            Inputs(**columns),
            buffers["labels"],
            buffers["mask"],
            self._round_info,
            cast("int", _Changing("the number of the step")),
            buffers.get("second view"),
            buffers.get("second statistics"),
        )
        compute = super().__call__
        replay = self._graphs.record(lambda: compute(steady))
        return None if replay is None else _Recording(buffers, replay)


@dataclass(frozen=True)
class _Recording:
    """A recorded step, and the buffers from which it reads its batch."""

    buffers: Tensors
    replay: Callable[[], Computed]


class _Changing:
    """Stands for what differs between the steps of a recording; any use of it stops recording."""

    def __init__(self, what: str) -> None:
        self._what = what

    def _used(self, *arguments: Any, **named: Any) -> Any:
        raise RecordingError(f"a step depends on {self._what}")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = (
        _used
    )
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __divmod__ = __rdivmod__ = _used
    __pow__ = __rpow__ = __neg__ = __abs__ = __int__ = __float__ = __index__ = __bool__ = _used
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __hash__ = _used
    __iter__ = __len__ = __getitem__ = __contains__ = __str__ = __format__ = _used
    # `StepDraws` has one member.
    rows = _used


def _steady(round_info: RoundInfo, buffers: Tensors) -> RoundInfo:
    """A round of which a step can read what lies in buffers or is the same in all rounds."""
    own = {"steps", "class counts"}
    return replace(
        round_info,
        clients=cast("Any", _Changing("the clients' ids or draws for each of them")),
        server_round=cast("Any", _Changing("the number of the round")),
        lr=cast("Any", _Changing("the learning rate")),
        ahead=cast("Any", _Changing("draws of its own")),
        received={n.removeprefix("received."): v for n, v in buffers.items() if n not in own},
        steps_K=buffers["steps"],
        class_counts_KC=buffers["class counts"],
    )


def _of_round(round_info: RoundInfo) -> Tensors:
    """The tensors of a round, by names that no trained tensor has."""
    received = {f"received.{name}": value for name, value in round_info.received.items()}
    return {
        **received,
        "steps": round_info.steps_K,
        "class counts": round_info.class_counts_KC,
    }


def _of_batch(batch: Batch) -> Tensors:
    besides = zip(
        BESIDES,
        (batch.labels_KB, batch.mask_KB, batch.second_KBD, batch.second_statistics),
        strict=True,
    )
    return {**batch.inputs.columns(), **{n: v for n, v in besides if v is not None}}


def _shapes(tensors: Tensors) -> Shapes:
    return tuple((name, value.shape, value.dtype) for name, value in tensors.items())


@torch.no_grad()
def _write(buffers: Tensors, values: Tensors) -> None:
    """Copy values into the buffers of the same names."""
    for name, buffer in buffers.items():
        buffer.copy_(values[name])
