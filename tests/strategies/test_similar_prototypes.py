"""Each class's most similar prototypes of others, against sorting with loops."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedprompt.config.fields import build
from fedprompt.federation.registry import strategy_class
from fedprompt.federation.screening import Update

CLIENTS, C, D, PEERS = 6, 4, 3, 2
SHAPES = {"prototypes": (C, D), "entropy": (C,)}


def strategy(peers: int = PEERS) -> Any:
    cls = strategy_class("similar_prototypes")
    extras = {
        "peers.prototypes": np.zeros((peers, C, D), np.float32),
        "peers.entropy": np.ones((peers, C), np.float32),
        "peers.known": np.zeros(peers, np.float32),
    }
    made = cls(
        build(cls.Config, {"name": "similar_prototypes"}, "strategy"),
        shapes=SHAPES,
        seed=1,
        extras=extras,
    )
    made.set_nodes({k: 500 + k for k in range(CLIENTS)})
    return made


def upload(client: int, server_round: int = 1) -> dict[str, NDArray[np.float32]]:
    draw = np.random.default_rng((client, server_round))
    prototypes = draw.standard_normal((C, D)).astype(np.float32)
    prototypes[client % C] = 0  # no image of this class
    return {"prototypes": prototypes, "entropy": draw.random(C).astype(np.float32)}


def reply(made: Any, clients: list[int], server_round: int = 1) -> None:
    start = {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}
    updates = [Update(c, upload(c, server_round), num_examples=1) for c in clients]
    made.aggregate(server_round, start, updates)


def expected(client: int, others: list[int], peers: int = PEERS) -> list[list[int]]:
    """For each class the others by similarity and then by id."""
    own = upload(client)["prototypes"]
    return [
        sorted(
            (o for o in sorted(others) if o != client),
            key=lambda o: -float(own[c] @ upload(o)["prototypes"][c]),
        )[:peers]
        for c in range(C)
    ]


def assert_sent(sent: dict[str, Any], chosen: list[list[int]]) -> None:
    for c, peers in enumerate(chosen):
        for e, peer in enumerate(peers):
            np.testing.assert_array_equal(
                sent["peers.prototypes"][e, c], upload(peer)["prototypes"][c]
            )
            assert sent["peers.entropy"][e, c] == upload(peer)["entropy"][c]


def test_each_class_has_its_own_most_similar_clients() -> None:
    """In one exchange and one client at a time; replies come in any order."""
    for together in (True, False):
        made, clients = strategy(), [4, 2, 0, 5, 1, 3]
        reply(made, clients)
        if together:
            made.before_exchange(clients)
        for client in range(CLIENTS):
            sent = made.client_extras(2, client)
            chosen = expected(client, clients)
            assert_sent(sent, chosen)
            assert sent["peers.known"].tolist() == [1, 1]
        assert len({tuple(peers) for peers in chosen}) > 1
    assert not made.extras["peers.known"].any(), "the starting values are not written to"


def test_rows_that_nobody_fills_keep_the_methods_values() -> None:
    made = strategy(peers=3)
    assert not made.client_extras(1, 0)["peers.known"].any()
    reply(made, [1, 4])
    assert not made.client_extras(2, 0)["peers.known"].any()
    sent = made.client_extras(2, 1)
    assert_sent(sent, [[4]] * C)
    assert sent["peers.known"].tolist() == [1, 0, 0]
    assert (sent["peers.entropy"][1:] == 1).all()


def test_a_restored_server_sends_the_same() -> None:
    made, again = strategy(), strategy()
    reply(made, list(range(CLIENTS)))
    again.load_state(made.state())
    for client in range(CLIENTS):
        ours, theirs = made.client_extras(2, client), again.client_extras(2, client)
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name])
