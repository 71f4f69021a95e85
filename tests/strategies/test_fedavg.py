"""FedAvg, against numbers worked out by hand and against Flower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from flwr.app import (
    Message,
)
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from fedprompt.messages import to_arrays, to_wire
from fedprompt.strategies.fedavg import FedAvg, FedAvgConfig
from tests.support.strategies import (
    answer,
    content,
    full,
    send,
    shared_after,
    strategy_of_clients,
)


def average(values: Sequence[float], examples: Sequence[int], **options: Any) -> float:
    """FedAvg of clients whose whole prompt is one value; checks that all numbers agree."""
    strategy = strategy_of_clients(len(values), **options)
    messages = send(strategy, {"ctx": full(0.0)})
    replies = [
        answer(m, {"ctx": full(v)}, n) for m, v, n in zip(messages, values, examples, strict=True)
    ]
    after = shared_after(strategy, replies)
    assert after is not None
    assert after["ctx"].dtype == np.float32
    assert len(set(after["ctx"].ravel().tolist())) == 1
    return float(after["ctx"][0, 0])


# FedAvg


def test_fedavg_weighs_by_images() -> None:
    # (1 * 10 + 4 * 30 + 7 * 60) / 100
    assert average([1.0, 4.0, 7.0], [10, 30, 60]) == 5.5
    assert average([1.0, 4.0, 7.0], [5, 5, 5]) == 4.0
    assert average([3.0], [17]) == 3.0


def test_sums_run_in_float64() -> None:
    assert average([1.0] * 1000, [1] * 1000) == 1.0
    # In float32 the small ones vanish beside 2^24 (and 2^24 + 1 is no float32 at all).
    values = [2.0**24, 1.0, 1.0, 1.0, -(2.0**24), 1.0, 1.0, 0.0]
    assert average(values, [1] * 8, config=FedAvgConfig(max_norm=1e9)) == 0.625


def test_a_hundred_rounds_of_one_step_are_exact() -> None:
    strategy, shared = strategy_of_clients(3), {"ctx": full(0.0)}
    for server_round in range(1, 101):
        messages = send(strategy, shared, server_round)
        new = {"ctx": shared["ctx"] + np.float32(1)}
        after = shared_after(strategy, [answer(m, new, n + 1) for n, m in enumerate(messages)])
        assert after is not None
        shared = after
    assert shared["ctx"].tolist() == [[100.0, 100.0], [100.0, 100.0]]


def test_fedavg_equals_flowers() -> None:
    draw = np.random.default_rng(1)
    ours = strategy_of_clients(5)
    messages = send(ours, {"ctx": full(0.0)})
    replies = [
        answer(m, {"ctx": draw.standard_normal((2, 2)).astype(np.float32)}, 10 * k + 1)
        for k, m in enumerate(messages)
    ]
    arrays, _ = FlowerFedAvg().aggregate_train(1, replies)
    theirs = to_arrays(arrays) if arrays is not None else {}
    after = shared_after(ours, replies)
    assert after is not None
    np.testing.assert_allclose(after["ctx"], theirs["ctx"], rtol=1e-6, atol=1e-6)


def test_losses_are_weighted_means() -> None:
    strategy = strategy_of_clients(2)
    one, two = send(strategy, {"ctx": full(0.0)})
    replies = [
        Message(
            content({"ctx": full(1)}, **{"num-examples": n, "loss": x, "other": 9.0}), reply_to=m
        )
        for m, n, x in ((one, 1, 2.0), (two, 3, 6.0))
    ]
    _, metrics = strategy.aggregate_train(1, replies)
    assert metrics is not None
    assert dict(metrics) == {"sampled": 2, "accepted": 2, "rejected": 0, "loss": 5.0}


def test_aggregation_does_not_change_what_it_is_given() -> None:
    strategy = strategy_of_clients(2)
    start = {"ctx": full(0.5)}
    messages = send(strategy, start)
    replies = [answer(m, {"ctx": full(k)}) for k, m in enumerate(messages)]
    before = [to_wire(r) for r in replies]
    assert isinstance(strategy, FedAvg)
    strategy.aggregate_train(1, replies)
    assert [to_wire(r) for r in replies] == before
    assert start["ctx"].tolist() == [[0.5, 0.5], [0.5, 0.5]]
