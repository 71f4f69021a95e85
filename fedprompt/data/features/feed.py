"""The images of a block of clients, from which every local step takes its batch.

Suffixes: N images of all clients, S steps, K clients, A clients that still train, B images of a
batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedprompt.data.features.inputs import Inputs
from fedprompt.runtime.device_memory import free_memory

SHARE = 0.25
"""Share of a device's free memory that the pixels of a block may take for the whole round."""


def resident(inputs_N: Inputs, device: torch.device) -> Inputs:
    """Those columns of images that are moved to a device once per round.

    Features and patches always are. Pixels are, as bytes, if they leave most of the memory to the
    training itself: an image of 224 x 224 pixels takes 150 kB.

    Args:
        inputs_N: the images of all clients of a block, on the CPU.
        device: the device that trains.
    """
    pixels = inputs_N.pixels
    if pixels is None or device.type == "cpu":
        return inputs_N
    if pixels.numel() * pixels.element_size() <= SHARE * free_memory(device):
        return inputs_N
    return inputs_N.without_pixels()


class Feed:
    """Gives every step its images, on the device.

    Args:
        inputs_N: the images of all clients; what `resident` named is on the device.
        index_SKB: rows of each step's images, on the device.
        pixels_N: the pixels on the CPU, if they are too many for the device. They are copied batch
            by batch, from page-locked memory and beside the computation.
        rows_SKB: `index_SKB` on the CPU; needed with `pixels_N` only.
    """

    def __init__(
        self,
        inputs_N: Inputs,
        index_SKB: Tensor,
        pixels_N: Tensor | None = None,
        rows_SKB: Tensor | None = None,
    ) -> None:
        self._inputs_N, self._index_SKB = inputs_N, index_SKB
        self._pixels_N, self._rows_SKB = pixels_N, rows_SKB
        self._device = index_SKB.device
        self._ahead: tuple[int, Tensor] | None = None
        # Copies on a stream of their own run while the default stream computes.
        self._stream: Any = (
            torch.cuda.Stream(self._device)
            if pixels_N is not None and self._device.type == "cuda"
            else None
        )

    def batch(self, step: int, active: int) -> Inputs:
        """The images (A, B, ...) of one step, pixels normalised.

        Args:
            step: the step's number in the round, from 0.
            active: the number A of clients that still train.
        """
        inputs_AB = self._inputs_N[self._index_SKB[step, :active]]
        if self._pixels_N is not None:
            inputs_AB = inputs_AB.with_pixels(self._copied(step, active))
        return inputs_AB.on(self._device)

    def prefetch(self, step: int, active: int) -> None:
        """Begin to copy the pixels of a later step, if they are copied at all.

        It is called once a step's kernels have been started, so that the CPU gathers the next
        pixels while the device computes.

        Args:
            step: the later step.
            active: clients that train now; no fewer than in the later step.
        """
        if self._pixels_N is None or step >= len(self._index_SKB):
            return
        assert self._rows_SKB is not None
        rows_AB = self._rows_SKB[step, :active]
        shape = (rows_AB.numel(), *self._pixels_N.shape[1:])
        pinned = torch.empty(shape, dtype=self._pixels_N.dtype, pin_memory=self._stream is not None)
        torch.index_select(self._pixels_N, 0, rows_AB.flatten(), out=pinned)
        pinned = pinned.unflatten(0, rows_AB.shape)
        if self._stream is None:
            self._ahead = step, pinned.to(self._device)
            return
        with torch.cuda.stream(self._stream):
            self._ahead = step, pinned.to(self._device, non_blocking=True)

    def _copied(self, step: int, active: int) -> Tensor:
        """The pixels (A, B, 3, H, W) of one step, copied now if they were not before."""
        if self._ahead is None or self._ahead[0] != step:
            self.prefetch(step, active)
        assert self._ahead is not None
        pixels = self._ahead[1]
        if self._stream is not None:
            # The computation waits for the copy, not the host; and the allocator must not reuse
            # this memory for the next copy before the computation has read it.
            now = torch.cuda.current_stream(self._device)
            now.wait_stream(self._stream)
            pixels.record_stream(now)
        return pixels[:active]
