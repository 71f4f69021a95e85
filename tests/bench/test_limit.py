"""The bare matrix products of a step, recorded and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fedprompt.bench.counting import count_gflop
from fedprompt.bench.limit import Replay, record


def test_every_product_of_a_call_is_recorded_and_replayed() -> None:
    layer, w = nn.Linear(20, 30), torch.randn(5, 30, 4)
    x = torch.randn(5, 7, 20, requires_grad=True)

    def call() -> None:
        (layer(x) @ w).sum().backward()

    products = record(call)
    assert sorted({p.function.__name__ for p in products}) == ["addmm", "bmm", "mm"]
    replay = Replay(products)
    assert count_gflop(replay) == pytest.approx(count_gflop(call))
    # Its own backward pass hands the product a gradient that repeats one element.
    assert any(0 in operand.stride for p in products for operand in p.inputs)


def test_limit(bench: Callable[..., Any]) -> None:
    (line,) = bench("limit", "--classes", "5", "--repeats", "2", "--profile")
    assert line["share_of_limit"] == pytest.approx(line["reference_s"] / line["ours_s"])
    assert line["products_gflop"] > 0
    # Nothing but matrix products is worth counting in our step.
    assert line["other_gflop"] < 0.1 * line["products_gflop"]
