"""Clustered: groups of similar clients train prompts of their own."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedprompt.messages import to_arrays
from fedprompt.strategies.clustered import Clustered, groups
from tests.support.strategies import (
    Rows,
    answer,
    make_strategy,
    random_rows,
    send,
    shared_after,
    step,
    updates_of,
)


def two_kinds(clients: int = 6) -> Rows:
    """Clients 0, 2, 4 pull one way, 1, 3, 5 the other; each with noise of its own."""
    draw = np.random.default_rng(2)
    side = np.where(np.arange(clients) % 2 == 0, 1.0, -1.0)[:, None]
    return side + 0.1 * draw.standard_normal((clients, 8))


def test_groups_are_found() -> None:
    rows = two_kinds()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert groups(rows, 2).tolist() == [0, 1, 0, 1, 0, 1]
    assert groups(rows, 1).tolist() == [0] * 6
    assert sorted(set(groups(rows, 6).tolist())) == list(range(6))
    assert groups(np.zeros((1, 8)), 3).tolist() == [0]


def test_every_cluster_is_sent_its_own_prompts() -> None:
    strategy = make_strategy("clustered", (8,), 6, common_rounds=1, clusters=2)
    start = {"ctx": np.zeros(8, np.float32)}
    rows = two_kinds().astype(np.float32)
    messages = send(strategy, start, 1)
    one = shared_after(strategy, [answer(m, {"ctx": r}) for m, r in zip(messages, rows)])  # noqa: B905
    assert one is not None
    assert all(strategy.client_shared(c) is None for c in range(6)), "a common round"
    messages = send(strategy, one, 2)
    arrays, _ = strategy.aggregate_train(
        2, [answer(m, {"ctx": r}) for m, r in zip(messages, rows, strict=True)]
    )
    assert strategy.cluster_of == {0: 0, 1: 1, 2: 0, 3: 1, 4: 0, 5: 1}
    assert strategy.metrics() == {"clusters": [3, 3]}
    sent = [_sent(m) for m in send(strategy, {"ctx": rows.mean(0)}, 3)]
    np.testing.assert_allclose(sent[0], rows[::2].mean(0), rtol=1e-5)
    np.testing.assert_allclose(sent[3], rows[1::2].mean(0), rtol=1e-5)
    assert arrays is not None
    np.testing.assert_allclose(_values(arrays), rows.mean(0), atol=1e-6)


def _sent(message: Any) -> Rows:
    return _values(message.content["arrays"])


def _values(record: Any) -> Rows:
    return to_arrays(record)["ctx"]


def test_a_late_client_joins_the_nearest_cluster() -> None:
    strategy: Clustered = make_strategy("clustered", (8,), 6, common_rounds=0, clusters=2)
    rows = two_kinds()
    shared = {"ctx": np.zeros(8, np.float32)}
    strategy.aggregate(1, shared, updates_of(rows)[:4])
    assert strategy.client_shared(5) is None
    strategy.aggregate(2, shared, updates_of(rows)[4:])
    assert strategy.cluster_of == {0: 0, 1: 1, 2: 0, 3: 1, 4: 0, 5: 1}


def test_a_late_client_joins_after_a_restart_as_before() -> None:
    strategy, resumed = (make_strategy("clustered", (8,), 6, common_rounds=0) for _ in range(2))
    rows, shared = two_kinds(), {"ctx": np.zeros(8, np.float32)}
    strategy.aggregate(1, shared, updates_of(rows)[:4])
    resumed.load_state(strategy.state())
    resumed.aggregate(2, shared, updates_of(rows)[4:])
    assert resumed.cluster_of == {0: 0, 1: 1, 2: 0, 3: 1, 4: 0, 5: 1}


def test_one_cluster_is_fedavg() -> None:
    rows, images = random_rows(), list(range(1, 11))
    one = make_strategy("clustered", (6,), common_rounds=0, clusters=1)
    assert (
        step(one, rows, images=images) == step(make_strategy("fedavg", (6,)), rows, images=images)
    ).all()
