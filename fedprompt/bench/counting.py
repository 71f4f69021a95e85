"""Floating-point operations of a call, counted by PyTorch's dispatcher as it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_gflop(call: Callable[[], Any]) -> float:
    """10^9 operations (a multiply-add is two) of matrix products, convolutions and attention.

    The backward passes that `call` runs are included, those of custom autograd functions too.
    Elementwise work is not counted.
    """
    counter = FlopCounterMode(display=False)
    with _countable_attention(), counter:
        call()
    return float(counter.get_total_flops()) / 1e9


@contextmanager
def _countable_attention() -> Iterator[None]:
    """Without nn.MultiheadAttention's fused inference path, which the counter cannot see into."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
