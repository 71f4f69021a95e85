"""Rounds on a grid, and what they leave behind."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from flwr.app import Message, MessageType, MetricRecord, RecordDict

from fedprompt.config.schema import Config
from fedprompt.federation.server_app import Federation
from fedprompt.messages import node_of
from fedprompt.methods.base import Tensors
from tests.support.builders import small_config


def private_tensors(grid: Any) -> Tensors:
    """Private tensors of all clients that have some: their ids, and by name a client axis."""
    clients = range(grid.workspace.num_clients)
    states = {c: tensors for c in clients if (tensors := grid.private.get(c))}
    if not states:
        return {}
    names = next(iter(states.values()))
    stacked = {n: torch.stack([tensors[n] for tensors in states.values()]) for n in names}
    return {"clients": torch.tensor(list(states)), **{f"tensor/{n}": t for n, t in stacked.items()}}


def federate(grid: Any, rounds: int = 3) -> tuple[Tensors, Tensors, list[dict[str, Any]]]:
    """Shared tensors, private tensors and metrics after some rounds."""
    federation = Federation(grid.workspace, grid)
    federation.join()
    lines = []
    for server_round in range(1, rounds + 1):
        lines.append(federation.train_round(server_round) | federation.evaluate(server_round))
    return federation.shared, private_tensors(grid), lines


def assert_same(
    first: tuple[Tensors, Tensors, Any], second: tuple[Tensors, Tensors, Any], rtol: float
) -> None:
    """Bitwise for rtol = 0, else relative to the largest value."""
    for a, b in zip(first[:2], second[:2], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if rtol == 0:
                assert torch.equal(a[name], b[name]), name
            else:
                gap = (a[name].double() - b[name].double()).abs().max()
                assert gap <= rtol * b[name].double().abs().max(), name
    if rtol == 0:
        assert first[2] == second[2]


def introduce(
    workspace: Any, clients: Sequence[int], messages: Sequence[Message], private: Any
) -> tuple[list[Message], dict[int, Tensors]]:
    """Clients that reply with their id, whatever they are asked."""
    del workspace, private
    return [
        Message(RecordDict({"metrics": MetricRecord({"client": c})}), reply_to=m)
        for c, m in zip(clients, messages, strict=True)
    ], {}


def queries(clients: Sequence[int]) -> list[Message]:
    """One message per client that asks for its id."""
    return [
        Message(RecordDict(), dst_node_id=node_of(c), message_type=MessageType.QUERY)
        for c in clients
    ]


def scenes(**sections: Any) -> Config:
    """A small experiment on Ray whose workspace worker processes can open themselves."""
    base: dict[str, Any] = {
        "data": {
            "images_per_class": 4,
            "domains": ["savanna"],
            "templates": ["a photo of a {}."],
        },
        "partition": {"clients": 5, "scheme": "iid"},
        "simulation": {"kind": "ray", "workers": 2, "threads": 1, "clients_per_block": 2},
        "federation": {"rounds": 2},
    }
    for key, value in sections.items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    return small_config(**base)


def wait_for_workers(grid: Any) -> None:
    """Return when all workers of a Ray grid are up, which it notices in an exchange."""
    federation = Federation(grid.workspace, grid)
    federation.join()
    # A worker that was killed is started again, which takes long where all cores are busy.
    deadline = time.monotonic() + 120
    while not all(slot.free for slot in grid.pool.slots):
        assert time.monotonic() < deadline
        federation.evaluate(0)
