"""Floating-point operations of a call, counted by PyTorch's dispatcher while the call runs.

The benchmarks report them beside measured times: the ratio of two counts is what a path could save
at most if both ran equally well.

Shape suffixes in formulas: T queries, S keys, E and V widths of keys and values, after batch and
heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

FUSED_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
"""PyTorch's fused attention kernels on CPUs and CUDA devices, of all supported releases."""


def count_gflop(call: Callable[[], Any]) -> float:
    """10^9 operations of matrix products, convolutions and attention; a multiply-add is two.

    The backward passes that `call` runs are included, those of custom autograd functions too.
    Elementwise work is not counted. Attention counts every pair of a query and a key, also pairs
    that a mask excludes. The backward pass of a fused kernel counts the scores once more, because
    such kernels compute them again instead of keeping them.

    Args:
        call: runs once, on CPU or CUDA tensors.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_attention_formulas())
    with _countable_attention(), counter:
        call()
    return float(counter.get_total_flops()) / 1e9


def _attention_formulas() -> dict[Any, Callable[..., int]]:
    """A formula for every fused attention kernel of the installed PyTorch.

    PyTorch's counter covers only some of them, which differ between releases; on a CPU it silently
    counts nothing. Attention without a fused kernel is made of ordinary products and counted there.
    """
    formulas: dict[Any, Callable[..., int]] = {}
    for name in FUSED_ATTENTION:
        # Releases differ in the kernels that they have, too.
        if hasattr(torch.ops.aten, name):
            formulas[getattr(torch.ops.aten, name)] = _forward
        if hasattr(torch.ops.aten, f"{name}_backward"):
            formulas[getattr(torch.ops.aten, f"{name}_backward")] = _backward
    return formulas


def _forward(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *rest: Any, **options: Any
) -> int:
    """Q K^T and P V for shapes (..., T, E), (..., S, E) and (..., S, V).

    Batch and heads are those of the query: keys and values may have fewer heads, which several
    query heads share.
    """
    scores = math.prod(query[:-1]) * key[-2]
    # E multiply-adds per score for Q K^T, V for P V, and two operations for each.
    return 2 * scores * (query[-1] + value[-1])


def _backward(
    gradient: Sequence[int],
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    *rest: Any,
    **options: Any,
) -> int:
    """Q K^T once more, and the gradients of P, Q, K and V: five products."""
    scores = math.prod(query[:-1]) * key[-2]
    return 2 * scores * (3 * query[-1] + 2 * value[-1])


@contextmanager
def _countable_attention() -> Iterator[None]:
    """Switch off the fused inference path of nn.MultiheadAttention.

    It is a single operation, projections included, for which the counter has no formula.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
