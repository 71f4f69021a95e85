"""How far two tensors are apart."""

from __future__ import annotations

from torch import Tensor


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest value of `b`."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())
