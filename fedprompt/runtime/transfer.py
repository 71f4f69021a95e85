"""Copies between the host and a device, as few as possible.

A copy costs a device about ten microseconds however small it is, and one to the host also waits for
everything that the device has still to do. Local training therefore moves all small tensors of a
round in one copy at its beginning, and takes all results back in one at its end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ALONE = 2**24
"""Bytes from which a tensor is copied by itself: packing it would copy it once more on its side."""
_ALIGNED = 256
"""Bytes to whose multiples the parts of a packed copy are aligned, as PyTorch's allocator does."""


def moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Move tensors to a device.

    Args:
        tensors: tensors of any types and shapes, on at most one other device.
        device: where to move them.

    Returns:
        The tensors on `device`, in their order. Small ones share a storage. Those that are there
        already are returned as they are.
    """

    def is_packed(tensor: Tensor) -> bool:
        return tensor.device.type != device.type and 0 < _bytes(tensor) < ALONE

    parts = iter(_packed([t for t in tensors if is_packed(t)], device))
    return [next(parts) if is_packed(t) else t.to(device) for t in tensors]


def moved_by_name(
    containers: Sequence[Mapping[str, Tensor]], device: torch.device
) -> list[dict[str, Tensor]]:
    """As `moved`, for tensors that are in several containers."""
    parts = iter(moved([t for container in containers for t in container.values()], device))
    return [{name: next(parts) for name in container} for container in containers]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _packed(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Move tensors, none of them empty, in one copy."""
    if not tensors:
        return []
    sizes = [math.ceil(_bytes(t) / _ALIGNED) * _ALIGNED for t in tensors]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=tensors[0].device)
    for part, tensor in zip(buffer.split(sizes), tensors, strict=True):
        _as(part, tensor).copy_(tensor)
    there = buffer.to(device).split(sizes)
    return [_as(part, tensor) for part, tensor in zip(there, tensors, strict=True)]


def _as(part: Tensor, tensor: Tensor) -> Tensor:
    """Read bytes as a tensor of the type and shape of another."""
    return part[: _bytes(tensor)].view(tensor.dtype).view(tensor.shape)
