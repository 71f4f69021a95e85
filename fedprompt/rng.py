"""Every random draw is keyed by its purpose, so no result depends on order, worker or restart."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 64-bit seed that depends on `seed` and on every part of `purpose`.

    Stable across processes, machines and Python versions (SHA-256 of the parts, not `hash`).
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """NumPy generator for one purpose, e.g. `generator(seed, "shuffle", round, client, epoch)`."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, *purpose)))


def normal(shape: tuple[int, ...], std: float, seed: int, *purpose: str | int) -> torch.Tensor:
    """Float32 tensor of `shape` drawn from N(0, std^2) for one purpose, on the CPU."""
    draw = generator(seed, *purpose).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(draw * np.float32(std))


def uniform(shape: tuple[int, ...], seed: int, *purpose: str | int) -> torch.Tensor:
    """Float32 tensor of `shape` drawn from U[0, 1) for one purpose, on the CPU."""
    return torch.from_numpy(generator(seed, *purpose).random(shape, dtype=np.float32))
