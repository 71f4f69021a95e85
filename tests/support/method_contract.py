"""What the contract tests share: clients of unequal sizes, and the method's own strategy."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import build as build_options
from fedprompt.config.schema import TrainingConfig
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.features.table import FeatureTable
from fedprompt.federation.registry import strategy_class
from fedprompt.federation.screening import Update
from fedprompt.methods.base import ClientData, Method, Tensors
from fedprompt.training import LocalResult, train_clients
from tests.support.detectors import strategy_of

SIZES = (5, 12, 9)
"""Images of three clients; with batches of 4, two of them end with a partial batch."""
NEW_NAMES = ("pine forest", "oil tank", "airport")


def clients(columns: FeatureTable, dataset: ImageDataset) -> list[ClientData]:
    data, first = [], 0
    for client, size in enumerate(SIZES):
        index = np.arange(first, first + size)
        labels = torch.from_numpy(dataset.labels_N[index])
        data.append(ClientData(client, columns.rows(index), labels))
        first += size
    return data


class Server:
    """The method's own strategy, without messages."""

    def __init__(self, method: Method, data: Sequence[ClientData]) -> None:
        keys = strategy_of(method)
        cls = strategy_class(keys["name"])
        start = {n: t.numpy() for n, t in method.init_shared(1).items()}
        self.strategy = cls(
            build_options(cls.Config, keys, "strategy"),
            shapes={n: a.shape for n, a in start.items()},
            seed=1,
            extras={n: t.numpy() for n, t in method.init_extras(1).items()},
        )
        self.strategy.set_nodes({d.client: d.client for d in data})
        self.shared = start

    def send(self, server_round: int, data: Sequence[ClientData]) -> list[Tensors]:
        return [
            {
                n: torch.from_numpy(np.array(a))
                for n, a in (
                    self.shared | self.strategy.client_extras(server_round, d.client)
                ).items()
            }
            for d in data
        ]

    def collect(self, server_round: int, results: Sequence[LocalResult]) -> None:
        updates = [
            Update(r.client, {n: t.numpy() for n, t in r.shared.items()}, r.num_examples)
            for r in results
        ]
        self.shared = self.strategy.aggregate(server_round, self.shared, updates)


def first_private(method: Method, data: Sequence[ClientData]) -> list[Tensors]:
    return [method.init_private_from_data(method.init_private(1, d.client), d, 1) for d in data]


def starts(method: Method, data: Sequence[ClientData]) -> tuple[list[Tensors], list[Tensors]]:
    return Server(method, data).send(1, data), first_private(method, data)


def train(
    method: Method,
    data: Sequence[ClientData],
    received: Sequence[Tensors],
    private: Sequence[Tensors],
    server_round: int = 1,
    momentum: Sequence[Tensors] | None = None,
    **changes: Any,
) -> list[LocalResult]:
    settings = {"lr": 0.01, "batch_size": 4, "weight_decay": 0.0, "schedule": "constant"}
    config = TrainingConfig(**{**settings, **changes})
    return train_clients(
        method, received, private, data, config, seed=1, server_round=server_round, rounds=10,
        momentum=momentum,
    )  # fmt: skip


def shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in tensors.items()}


def assert_close(ours: Tensors, theirs: Tensors, start: Tensors, rtol: float) -> None:
    """Equal within `rtol` of how far training has moved the tensor, and float rounding."""
    assert ours.keys() == theirs.keys()
    for n in ours:
        moved = float((theirs[n] - start[n]).abs().max())
        size = float(theirs[n].abs().max())
        gap = float((ours[n] - theirs[n]).abs().max())
        assert gap <= rtol * moved + 1e-6 * size + 1e-8, (n, gap, moved)


def weights_hash(clip: FrozenCLIP) -> str:
    state = clip.model.state_dict()
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in state.values())).hexdigest()
