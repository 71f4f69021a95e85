"""Floating-point operations of a call, counted by PyTorch's dispatcher as it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_gflop(call: Callable[[], Any]) -> float:
    """10^9 operations (a multiply-add is two) of matrix products, convolutions and attention.

    The backward passes that `call` runs are included, those of custom autograd functions too.
    Elementwise work is not counted. Fused attention is counted by formulas of this module, because
    releases of PyTorch differ in which fused kernels their own counter knows.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_attention_formulas())
    with _countable_attention(), counter:
        call()
    return float(counter.get_total_flops()) / 1e9


def _attention_formulas() -> dict[Any, Callable[..., int]]:
    """A formula for every fused attention kernel of the installed PyTorch."""
    names = {
        schema.name.removeprefix("aten::").partition(".")[0]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("aten::_scaled_dot_product_")
    }
    # The `_math` variants are made of ordinary products, which are counted as such.
    fused = sorted(name for name in names if "attention" in name and "math" not in name)
    return {
        getattr(torch.ops.aten, name): _backward if name.endswith("_backward") else _forward
        for name in fused
    }


def _forward(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *rest: Any, **options: Any
) -> int:
    """Q K^T and P V of shapes (..., T, E), (..., S, E) and (..., S, V)."""
    scores = math.prod(query[:-1]) * key[-2]
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
    """Without nn.MultiheadAttention's fused inference path, which the counter cannot see into."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
