"""Which clients train in a round."""

from __future__ import annotations

import pytest
from flwr.app import (
    MessageType,
)

from fedprompt.messages import to_arrays
from tests.support.strategies import (
    full,
    send,
    strategy_of_clients,
)


def test_everyone_is_asked_in_the_order_of_client_ids() -> None:
    strategy = strategy_of_clients(0)
    strategy.set_nodes({2: 11, 0: 33, 1: 22})
    messages = send(strategy, {"ctx": full(0.5)}, server_round=4)
    assert [m.metadata.dst_node_id for m in messages] == [33, 22, 11]
    for message in messages:
        assert message.metadata.message_type == MessageType.TRAIN
        assert message.content["config"]["server-round"] == 4
        assert to_arrays(message.content["arrays"])["ctx"].tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_samples_depend_on_seed_and_round_only() -> None:
    drawn = [strategy_of_clients(20, seed=1, fraction=0.25).sample(r) for r in range(30)]
    strategy = strategy_of_clients(20, seed=1, fraction=0.25)
    assert [strategy.sample(r) for r in reversed(range(30))] == drawn[::-1]
    assert all(len(d) == 5 and d == sorted(set(d)) for d in drawn)
    assert len({tuple(d) for d in drawn}) > 25, "rounds differ"
    assert set().union(*drawn) == set(range(20)), "nobody is left out for ever"
    assert [strategy_of_clients(20, seed=2, fraction=0.25).sample(r) for r in range(30)] != drawn
    shuffled = strategy_of_clients(0, seed=1, fraction=0.25)
    shuffled.set_nodes({c: 7 * c + 3 for c in reversed(range(20))})
    assert [shuffled.sample(r) for r in range(30)] == drawn, "node ids must not matter"


@pytest.mark.parametrize(
    ("clients", "fraction", "expected"),
    [(10, 1.0, 10), (10, 0.25, 2), (10, 0.04, 1), (1, 0.1, 1), (3, 0.5, 2), (10, 0.99, 10)],
)
def test_sample_sizes(clients: int, fraction: float, expected: int) -> None:
    assert len(strategy_of_clients(clients, fraction=fraction).sample(1)) == expected


def test_the_sample_is_pinned() -> None:
    # A changed draw changes every published run with partial participation.
    drawn = [strategy_of_clients(10, seed=1, fraction=0.3).sample(r) for r in (1, 2)]
    assert drawn == [[2, 3, 7], [3, 4, 8]]
