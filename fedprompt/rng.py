"""Random draws that are keyed by their purpose, for the server, clients and nodes alike.

There is no global generator. Every draw states its purpose (`"shuffle", round, client, epoch`), so
that no result depends on the order of clients, on the worker that runs them, or on a restart.
Purposes must never be renamed: every published result depends on them.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # importing PyTorch takes seconds, and data sets need only NumPy's generators
    import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Derive a 64-bit seed that depends on `seed` and on every part of `purpose`.

    The result is the same in all processes, on all machines and in all versions of Python. It is
    derived with SHA-256, because Python salts `hash`. The type of each part counts: 1 and "1"
    differ.

    Args:
        seed: seed of the run.
        purpose: what the draw is for, usually a name followed by round, client and the like.
    """
    # The separator keeps ("a", "bc") and ("ab", "c") apart.
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Create the generator of one purpose, e.g. `generator(seed, "shuffle", round, client)`.

    Two calls with the same arguments return identical generators, so every independent draw needs
    its own purpose.
    """
    # The bit generator is explicit, because that of `np.random.default_rng` may change.
    return np.random.Generator(np.random.PCG64(derive_seed(seed, *purpose)))


def secret_generator(seed: int | None, *purpose: str | int) -> np.random.Generator:
    """Create a generator for noise that nobody may be able to repeat.

    Args:
        seed: fixes the numbers, for tests; None takes them from the operating system.
        purpose: as in `derive_seed`; without a seed it has no effect.
    """
    if seed is None:
        return np.random.Generator(np.random.PCG64(secrets.randbits(256)))
    return generator(seed, *purpose)


def normal(shape: tuple[int, ...], std: float, seed: int, *purpose: str | int) -> torch.Tensor:
    """Draw a float32 tensor from N(0, std^2) for one purpose, on the CPU.

    Args:
        shape: shape of the tensor.
        std: standard deviation.
        seed: seed of the run.
        purpose: as in `derive_seed`.
    """
    import torch

    # NumPy draws, because PyTorch's draws may differ between its releases and devices.
    draw = generator(seed, *purpose).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(draw * np.float32(std))


def uniform(shape: tuple[int, ...], seed: int, *purpose: str | int) -> torch.Tensor:
    """Draw a float32 tensor from U[0, 1) for one purpose, on the CPU; arguments as in `normal`."""
    import torch

    return torch.from_numpy(generator(seed, *purpose).random(shape, dtype=np.float32))
