"""Private tensors for tests of their stores, and comparisons of what is stored."""

from __future__ import annotations

from pathlib import Path

import torch

from fedprompt.methods.base import Tensors


def state(value: float) -> Tensors:
    """A client's tensors, all of one value and its third."""
    return {"ctx": torch.full((2, 3), value), "theta": torch.tensor(value / 3)}


def same(ours: Tensors | None, theirs: Tensors | None) -> bool:
    """Whether two states are equal bit for bit."""
    if ours is None or theirs is None:
        return ours is theirs
    return ours.keys() == theirs.keys() and all(
        ours[n].shape == theirs[n].shape
        and ours[n].numpy().tobytes() == theirs[n].numpy().tobytes()
        for n in ours
    )


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a folder, by name."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
