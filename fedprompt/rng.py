"""Random draws that are keyed by their purpose.

There is no global generator. Every draw names what it is for (`"shuffle", round, client, epoch`),
so that no result depends on the order of clients, the worker they run on, or a restart.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # importing PyTorch takes seconds, and data sets need only NumPy's generators
    import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 64-bit seed that depends on `seed` and on every part of `purpose`.

    It is the same in all processes, on all machines and in all versions of Python: it is made of
    SHA-256, because Python salts `hash`. The type of each part counts, so 1 and "1" differ.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """NumPy generator for one purpose, e.g. `generator(seed, "shuffle", round, client, epoch)`."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, *purpose)))


def normal(shape: tuple[int, ...], std: float, seed: int, *purpose: str | int) -> torch.Tensor:
    """Float32 tensor of `shape` drawn from N(0, std^2) for one purpose, on the CPU.

    Args:
        shape: of the tensor.
        std: standard deviation.
        seed: of the run.
        purpose: as in `derive_seed`.
    """
    import torch

    # NumPy draws, because PyTorch's draws may differ between its releases and devices.
    draw = generator(seed, *purpose).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(draw * np.float32(std))


def uniform(shape: tuple[int, ...], seed: int, *purpose: str | int) -> torch.Tensor:
    """Float32 tensor of `shape` drawn from U[0, 1) for one purpose, on the CPU."""
    import torch

    return torch.from_numpy(generator(seed, *purpose).random(shape, dtype=np.float32))
