"""What clients are sent of each other's uploads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedprompt.errors import UserError
from fedprompt.federation.registry import strategy_class
from fedprompt.federation.screening import Update

SHAPES = {"ctx": (2, 3), "other": (4,)}


def strategy(room: int = 4, clients: int = 4) -> Any:
    cls = strategy_class("all_peers")
    extras = {"peers.ctx": np.zeros((room, 2, 3), np.float32), "peers.known": np.zeros(room, "f4")}
    made = cls(cls.Config(), shapes=SHAPES, seed=1, extras=extras)
    made.set_nodes({k: 500 + k for k in range(clients)})
    return made


def update(client: int, value: float) -> Update:
    arrays = {n: np.full(s, value, np.float32) for n, s in SHAPES.items()}
    return Update(client, arrays, num_examples=client + 1)


def test_everybody_is_sent_all_last_uploads_and_trains_on_from_its_own() -> None:
    made = strategy()
    made.shared = {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}
    assert made.eval_extras() == {}
    assert made.client_shared(3) is None
    made.aggregate(1, made.shared, [update(1, 1.0), update(3, 3.0)])
    made.shared = made.aggregate(2, made.shared, [update(0, 5.0), update(3, 4.0)])
    for client in range(4):
        sent = made.client_extras(3, client)
        assert sent["peers.known"].tolist() == [1, 1, 1, 0]
        assert [float(row.mean()) for row in sent["peers.ctx"]] == [5, 1, 4, 0]
    assert made.eval_extras().keys() == made.extras.keys()
    mean = (1 * 5 + 4 * 4) / 5
    own = made.client_shared(1)
    assert float(own["ctx"].max()) == 1
    assert float(own["other"].max()) == pytest.approx(mean)
    assert made.client_shared(2) is None
    again = strategy()
    again.load_state(made.state())
    assert again.nearest(0) == [0, 1, 3]


def test_too_many_clients_and_no_prompts_to_exchange() -> None:
    with pytest.raises(UserError, match=r"5 clients.*method\.peers=5"):
        strategy(room=4, clients=5)
    cls = strategy_class("all_peers")
    with pytest.raises(UserError, match=r"e\.g\. plan"):
        cls(cls.Config(), shapes=SHAPES, seed=1)
