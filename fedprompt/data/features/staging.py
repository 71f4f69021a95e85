"""Batches of images on the device that encodes them, copied while it encodes the batch before.

Shape suffixes: B images of a batch, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Staged:
    """A batch of images.

    Attributes:
        here_BCHW: on the CPU.
        there_BCHW: on the device; on a CPU the same tensor.
    """

    here_BCHW: Tensor
    there_BCHW: Tensor


def staged(batches: Iterable[Tensor], device: torch.device) -> Iterator[Staged]:
    """Bring batches to a device, each while the batch before is encoded.

    On a CPU nothing is copied or taken ahead.

    Args:
        batches: images (B, C, H, W) on the CPU, taken one by one.
        device: where they are encoded.

    Yields:
        The batches in their order.
    """
    if device.type == "cpu":
        yield from (Staged(batch, batch) for batch in batches)
        return
    # Copies on a stream of their own run while the default stream computes.
    stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
    before: tuple[Staged, Any] | None = None
    for batch in batches:
        copied = _copied(batch, device, stream)
        # Only now, so that this batch is under way while the one before is encoded.
        if before is not None:
            yield _arrived(*before, device)
        before = copied
    if before is not None:
        yield _arrived(*before, device)


def _copied(batch: Tensor, device: torch.device, stream: Any) -> tuple[Staged, Any]:
    """Begin a copy; return the batch, and the event of the copy's end on CUDA."""
    if stream is None:
        return Staged(batch, batch.to(device)), None
    with torch.cuda.stream(stream):
        # Only from page-locked memory can a copy run beside the host.
        there = batch.pin_memory().to(device, non_blocking=True)
        return Staged(batch, there), stream.record_event()


def _arrived(batch: Staged, event: Any, device: torch.device) -> Staged:
    """The batch, whose copy the computation waits for; the host does not."""
    if event is not None:
        now = torch.cuda.current_stream(device)
        now.wait_event(event)
        # The allocator must not reuse this memory before the computation has read it.
        batch.there_BCHW.record_stream(now)
    return batch
