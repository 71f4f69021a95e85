"""Strategies with invented clients, messages and replies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedprompt.federation.registry import strategy_class
from fedprompt.federation.strategy import SharedPromptStrategy
from fedprompt.messages import Update, set_new_id, to_arrays, to_record

SHAPES = {"ctx": (2, 2)}
"""Shared tensors, unless a test has its own."""
NODE = 500
"""Node of client 0; client c is node 500 + c."""
Values = NDArray[np.float32]
Rows = NDArray[np.float64]


class NoGrid(Grid):
    """A grid that must not be used: Flower passes one to strategies, and ours never touch it."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return super().__getattribute__(name)
        raise AssertionError(f"the strategy used the grid: {name}")


NoGrid.__abstractmethods__ = frozenset()
GRID = NoGrid()  # type: ignore[abstract]


def full(value: float, shape: tuple[int, ...] = (2, 2)) -> Values:
    """A tensor of one value."""
    return np.full(shape, value, dtype=np.float32)


def strategy_of_clients(
    clients: int = 3, name: str = "fedavg", **options: Any
) -> SharedPromptStrategy:
    """A strategy of the shared tensors `SHAPES`; `options` are those of its constructor."""
    cls = strategy_class(name)
    settings = {"shapes": SHAPES, "seed": 1, **options}
    strategy = cls(settings.pop("config", cls.Config(name=name)), **settings)
    strategy.set_nodes({c: NODE + c for c in range(clients)})
    return strategy


def send(strategy: SharedPromptStrategy, start: Mapping[str, Values], server_round: int = 1) -> Any:
    """The training messages of a round, in the order of client ids."""
    arrays = to_record(start)
    return with_ids(strategy.configure_train(server_round, arrays, ConfigRecord(), GRID))


def with_ids(messages: Iterable[Message]) -> list[Message]:
    """Messages as a grid has sent them: each has an id, which its reply refers to."""
    sent = list(messages)
    for message in sent:
        set_new_id(message)
    return sent


def content(arrays: Mapping[str, Values | Array], **metrics: Any) -> RecordDict:
    """The content of a training reply."""
    record = {n: a if isinstance(a, Array) else Array(a) for n, a in arrays.items()}
    return RecordDict({"arrays": ArrayRecord(record), "metrics": MetricRecord(metrics)})


def answer(message: Message, arrays: Mapping[str, Values | Array], examples: Any = 1) -> Message:
    """A training reply."""
    return Message(content(arrays, **{"num-examples": examples}), reply_to=message)


def shared_after(
    strategy: SharedPromptStrategy, replies: Sequence[Message]
) -> dict[str, Values] | None:
    """The shared tensors after round 1, or None if nothing was aggregated."""
    arrays, _ = strategy.aggregate_train(1, replies)
    return None if arrays is None else to_arrays(arrays)


def make_strategy(name: str, shape: tuple[int, ...], clients: int = 10, **options: Any) -> Any:
    """A strategy of one shared tensor `ctx`; `options` are those of its config."""
    config = strategy_class(name).Config(name=name, **options)
    return strategy_of_clients(clients, name, config=config, shapes={"ctx": shape})


def updates_of(rows: Any, images: Any = None) -> list[Update]:
    """One update per row, by clients 0, 1, ..., of one image each unless `images` are given."""
    return [
        Update(k, {"ctx": np.asarray(row, np.float32)}, 1 if images is None else images[k])
        for k, row in enumerate(rows)
    ]


def step(strategy: SharedPromptStrategy, rows: Any, start: Any = None, images: Any = None) -> Rows:
    """The tensor `ctx` after one aggregation; it starts from zero unless `start` is given."""
    updates = updates_of(rows, images)
    last = np.zeros_like(updates[0].arrays["ctx"]) if start is None else np.asarray(start)
    shared = {"ctx": last.astype(np.float32)}
    strategy.sampled = [u.client for u in updates]
    return strategy.aggregate(1, shared, updates)["ctx"]


def random_rows(clients: int = 10, numbers: int = 6, seed: int = 0) -> Rows:
    """Normal numbers, one row per client."""
    return np.random.default_rng(seed).standard_normal((clients, numbers))
