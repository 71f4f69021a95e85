"""L2-normalised rows, with a gradient of few kernels on GPUs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALLEST = 1e-12
"""Rows are divided by no smaller length, as in `torch.nn.functional.normalize`."""


def normalised(x: Tensor) -> Tensor:
    """Rows (..., D) divided by their lengths.

    On a CPU this is `torch.nn.functional.normalize`, so that the bits of earlier results are kept.
    Elsewhere the values are the same, and the gradient takes four kernels instead of fifteen.
    """
    if x.device.type == "cpu":
        return F.normalize(x, dim=-1)
    return in_few_kernels(x)


def in_few_kernels(x: Tensor) -> Tensor:
    """`normalised` as GPUs compute it."""
    out: Tensor = _Normalised.apply(x)
    return out


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(_SMALLEST)
        out: Tensor = x / length
        ctx.save_for_backward(out, length)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        out, length = ctx.saved_tensors
        # The part of the gradient along a row would only change its length.
        along = (grad * out).sum(-1, keepdim=True)
        across: Tensor = torch.addcmul(grad, out, along, value=-1).div_(length)
        return across
