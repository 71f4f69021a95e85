"""The memory of a device: how much of it is free, and what happens when it runs out.

The grids ask before they form blocks of clients, and when a block has failed.
"""

from __future__ import annotations

import gc

import torch

from fedprompt.errors import DeviceFault
from fedprompt.runtime.machine import memory

DEVICE_ERRORS: tuple[type[BaseException], ...] = (
    (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()
)
"""Errors after which a process can no longer use its device. Older releases of PyTorch raise a
plain `RuntimeError` instead, which says nothing of the kind."""

_NO_MEMORY = (
    "can't allocate memory",  # PyTorch on CPUs: DefaultCPUAllocator
    "not enough memory",
    "cannot allocate memory",
    "out of memory",  # MPS, and CUDA libraries beside PyTorch's own allocator
    "ALLOC_FAILED",  # cuBLAS and cuDNN
)
"""What the text of a `RuntimeError` contains when an allocation has failed."""


def free_memory(device: torch.device) -> float:
    """Bytes of memory that are free now, on a GPU or on this machine.

    Args:
        device: the device of the backbone. For a CPU, the limits of a container count; where the
            system does not tell what is free, half of the memory counts as free.
    """
    if device.type == "cuda":
        # PyTorch keeps the blocks that it has freed. The driver counts them as used, but the next
        # tensors will be placed in them.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + cached)
    here = memory()
    return float(here.free) if here.free is not None else float(here.total or 0) / 2


def is_shortage(error: BaseException) -> bool:
    """Whether an error means that there was too little memory.

    Args:
        error: an error of PyTorch, of its libraries or of NumPy.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # On a CPU, PyTorch has no error type of its own for this.
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def device_fault(error: BaseException) -> DeviceFault:
    """The error that ends a run, or makes a worker be replaced.

    Args:
        error: one of `DEVICE_ERRORS`.
    """
    return DeviceFault(
        f"the device has failed ({type(error).__name__}: {error}); only a new process can use it, "
        "so resume the run."
    )


def give_back() -> None:
    """Free what nothing refers to any more, and return PyTorch's cached blocks to the GPU.

    Tensors in reference cycles stay allocated until a collection. Cached blocks are of no use to
    other processes, and to later work only if it needs blocks of the same sizes.
    """
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
