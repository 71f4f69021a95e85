"""A device that is short of memory: an allocator with a limit, on the CPU."""

from __future__ import annotations

import torch

from fedprompt.runtime.allocations import Allocations


class ShortMemory(Allocations):
    """Fails as PyTorch does when the tensors made inside it exceed `limit` bytes together.

    Args:
        limit: in bytes.
        error: what is raised; by default what a GPU raises.
    """

    def __init__(self, limit: float, error: type[RuntimeError] = torch.OutOfMemoryError) -> None:
        super().__init__()
        self.limit, self.error = limit, error
        self.refused = 0

    def added(self, size: int) -> None:
        if self.now + size > self.limit:
            self.refused += 1
            raise self.error(f"DefaultCPUAllocator: can't allocate memory: {size} bytes")
        super().added(size)
