from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedprompt.config.fields import build
from fedprompt.federation.registry import strategy_class
from fedprompt.federation.screening import Update
from fedprompt.strategies.fedavg import FedAvg, FedAvgConfig

SHAPES = {"ctx": (2, 3), "other": (4,)}
CLIENTS = 6


def strategy(places: int = 2) -> Any:
    cls = strategy_class("nearest_peers")
    extras = {
        "peers.ctx": np.zeros((places, 2, 3), np.float32),
        "peers.known": np.zeros(places, np.float32),
    }
    made = cls(
        build(cls.Config, {"name": "nearest_peers"}, "strategy"),
        shapes=SHAPES,
        seed=1,
        extras=extras,
    )
    made.set_nodes({k: 500 + k for k in range(CLIENTS)})
    return made


def prompt(client: int, server_round: int = 1) -> NDArray[np.float32]:
    draw = np.random.default_rng((client, server_round))
    return draw.standard_normal((2, 3)).astype(np.float32)


def updates(clients: list[int], server_round: int = 1) -> list[Update]:
    other = np.full(4, 1e3, np.float32)
    return [
        Update(c, {"ctx": prompt(c, server_round), "other": c * other}, num_examples=c + 1)
        for c in clients
    ]


def start() -> dict[str, Any]:
    return {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}


def test_the_nearest_others_are_sent_nearest_first() -> None:
    made = strategy()
    made.aggregate(1, start(), updates(list(range(CLIENTS))))
    for client in range(CLIENTS):
        distance = {
            c: float(np.sqrt(((prompt(c) - prompt(client)) ** 2).sum()))
            for c in range(CLIENTS)
            if c != client
        }
        nearest = sorted(distance, key=lambda c: distance[c])[:2]
        sent = made.client_extras(2, client)
        np.testing.assert_array_equal(sent["peers.ctx"], np.stack([prompt(c) for c in nearest]))
        np.testing.assert_array_equal(sent["peers.known"], [1, 1])
        assert sent["peers.ctx"].dtype == np.float32


def test_nobody_is_sent_peers_before_its_own_reply() -> None:
    made = strategy(places=3)
    assert not made.client_extras(1, 0)["peers.known"].any()
    made.aggregate(1, start(), updates([1, 4]))
    assert not made.client_extras(2, 0)["peers.known"].any()
    sent = made.client_extras(2, 1)
    np.testing.assert_array_equal(sent["peers.known"], [1, 0, 0])
    np.testing.assert_array_equal(sent["peers.ctx"][0], prompt(4))
    assert not sent["peers.ctx"][1:].any()
    assert not made.extras["peers.ctx"].any(), "the starting values are not written to"


def test_a_newer_upload_replaces_the_older_one() -> None:
    made = strategy(places=1)
    made.aggregate(1, start(), updates([1, 4]))
    made.aggregate(2, start(), updates([4], server_round=2))
    np.testing.assert_array_equal(made.client_extras(3, 1)["peers.ctx"][0], prompt(4, 2))
    np.testing.assert_array_equal(made.client_extras(3, 4)["peers.ctx"][0], prompt(1))


def test_equal_distances_are_settled_by_client_id() -> None:
    made = strategy()
    same = [
        Update(c, {"ctx": np.ones((2, 3), np.float32), "other": np.zeros(4)}, 1)
        for c in (0, 2, 3, 5)
    ]
    made.aggregate(1, start(), same)
    assert made.nearest(3) == [0, 2]


def test_state_survives_and_shares_no_memory() -> None:
    made, other = strategy(), strategy()
    assert made.state() == {}
    replies = updates([0, 2, 5])
    made.aggregate(1, start(), replies)
    replies[0].arrays["ctx"][:] = 99
    other.load_state({n: a.copy() for n, a in made.state().items()})
    for client in range(CLIENTS):
        ours, theirs = made.client_extras(2, client), other.client_extras(2, client)
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
    assert (made.client_extras(2, 2)["peers.ctx"] != 99).all()
    other.load_state({})
    assert not other.client_extras(2, 2)["peers.known"].any()


def test_the_average_is_fedavg_s_and_without_peers_nothing_is_sent() -> None:
    made = strategy()
    plain = FedAvg(FedAvgConfig(), shapes=SHAPES, seed=1)
    ours, theirs = (s.aggregate(1, start(), updates([0, 3, 4])) for s in (made, plain))
    for name in SHAPES:
        np.testing.assert_array_equal(ours[name], theirs[name])
    cls = strategy_class("nearest_peers")
    bare = cls(cls.Config(), shapes=SHAPES, seed=1)
    bare.aggregate(1, start(), updates([0, 3]))
    assert bare.client_extras(2, 0) == {}


def reference(uploads: dict[int, NDArray[np.float32]], client: int, count: int) -> list[int]:
    """All distances of one client, one after the other."""
    others = sorted(c for c in uploads if c != client)
    distance = {c: np.linalg.norm(uploads[c] - uploads[client]) for c in others}
    return sorted(others, key=lambda c: (distance[c], c))[:count]


def test_one_product_finds_whom_all_differences_find() -> None:
    """Prompts that moved little from one start, with twins and near twins, in any order."""
    draw = np.random.default_rng(3)
    start_P = draw.standard_normal((2, 3)).astype(np.float32) * 100
    clients = draw.permutation(200).tolist()
    uploads = {c: start_P + 1e-3 * draw.standard_normal((2, 3)).astype(np.float32) for c in clients}
    uploads |= {c: uploads[clients[0]].copy() for c in clients[1:5]}
    made = strategy(places=7)
    made.aggregate(
        1, start(), [Update(c, {"ctx": a, "other": np.zeros(4)}, 1) for c, a in uploads.items()]
    )
    made.before_exchange(clients[:150])
    for client in clients:
        expected = reference({c: a.reshape(1, -1) for c, a in uploads.items()}, client, 7)
        assert made.nearest(client) == expected


def test_an_exchange_is_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    made = strategy()
    made.aggregate(1, start(), updates([0, 2, 3, 5]))
    searched: list[list[int]] = []
    find = made._find
    monkeypatch.setattr(made, "_find", lambda clients: searched.append(clients) or find(clients))
    made.before_exchange([0, 1, 2, 3, 5])
    for client in (0, 1, 2, 3, 5):
        made.client_extras(2, client)
    assert searched == [[0, 2, 3, 5]]


def test_a_checkpoint_has_the_uploads_that_are_new() -> None:
    made, other = strategy(), strategy()
    made.aggregate(1, start(), updates([0, 2, 5]))
    first = dict(made.changed_client_states())
    made.aggregate(2, start(), updates([2, 4], server_round=2))
    second = dict(made.changed_client_states())
    assert list(first) == [0, 2, 5]
    assert list(second) == [2, 4]
    assert made.common_state() == {}
    for client, arrays in (first | second).items():
        other.load_client_state(client, arrays)
    assert dict(other.changed_client_states()) == {}
    for name, array in made.state().items():
        np.testing.assert_array_equal(other.state()[name], array)
