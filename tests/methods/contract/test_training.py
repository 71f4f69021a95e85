"""What every method promises about local training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.features.table import FeatureTable
from fedprompt.methods.base import Method, Tensors
from fedprompt.training import LocalResult
from tests.support.method_contract import (
    Server,
    assert_close,
    clients,
    first_private,
    shapes,
    starts,
    train,
    weights_hash,
)


def test_training_moves_prompts_and_nothing_else(
    trainable: Method, clip: FrozenCLIP, columns: FeatureTable, dataset: ImageDataset
) -> None:
    method, data = trainable, clients(columns, dataset)
    before = weights_hash(clip)
    server, private = Server(method, data), first_private(method, data)
    start, empty = [shapes(tensors) for tensors in private], shapes(method.init_private(1, 0))
    # An axis of 0 becomes as long as a client has images.
    assert all(
        {n: shape if empty[n][:1] != (0,) else (0, *shape[1:]) for n, shape in own.items()} == empty
        for own in start
    )
    shared = method.init_shared(1)
    first = [
        {f"shared.{n}": t for n, t in shared.items()}
        | {f"private.{n}": t for n, t in private[k].items()}
        for k in range(len(data))
    ]
    for server_round in (1, 2):
        results = train(method, data, server.send(server_round, data), private, server_round)
        server.collect(server_round, results)
        private = [r.private for r in results]
    for k, result in enumerate(results):
        assert shapes(result.shared) == shapes(method.init_shared(1))
        assert shapes(result.private) == start[k]
        last = {f"shared.{n}": t for n, t in result.shared.items()}
        last |= {f"private.{n}": t for n, t in result.private.items()}
        for n, t in last.items():
            assert t.dtype == torch.float32
            assert torch.isfinite(t).all(), n
            assert n in method.frozen or not torch.equal(t, first[k][n]), f"{n} does not learn"
        assert next(iter(result.losses)) == "ce"
        assert all(np.isfinite(v) for v in result.losses.values())
    assert weights_hash(clip) == before
    assert all(p.grad is None for p in clip.model.parameters())


def test_results_are_equal_for_every_block_size(
    trainable: Method, columns: FeatureTable, dataset: ImageDataset
) -> None:
    """In round 2 a client trains for the first time, beside two that train for the second.

    The sizes differ, so this also shows that padded batches change nothing. Weight decay and the
    momentum that clients keep move every tensor of a block that the optimiser is given, also where
    only one client trains it.
    """
    method, data = trainable, clients(columns, dataset)
    server, private = Server(method, data), first_private(method, data)
    momentum: list[Tensors] = [{} for _ in data]
    for server_round, blocks in ((1, [[0, 2]]), (2, [[0, 1, 2], [1, 0]])):
        received = server.send(server_round, data)
        start = (data, received, private, momentum)
        alone = [_block(method, [k], start, server_round)[0] for k in range(3)]
        results = [_block(method, clients_, start, server_round) for clients_ in blocks]
        for clients_, block in zip(blocks, results, strict=True):
            for k, ours in zip(clients_, block, strict=True):
                assert alone[k].losses == pytest.approx(ours.losses, rel=1e-3, abs=1e-5)
                assert_close(ours.shared, alone[k].shared, received[k], 1e-3)
                assert_close(ours.private, alone[k].private, private[k], 1e-3)
        server.collect(server_round, results[0])
        trained = {r.client: r for r in results[0]}
        private = [trained[k].private if k in trained else p for k, p in enumerate(private)]
        momentum = [trained[k].momentum if k in trained else m for k, m in enumerate(momentum)]


def _block(
    method: Method, of: list[int], start: tuple[list[Any], ...], server_round: int
) -> list[LocalResult]:
    """Train some clients together, from their data, received and private tensors and momentum."""
    data, received, private, momentum = ([values[k] for k in of] for values in start)
    state = "keep" if method.config.keeps_momentum else "reset"
    return train(
        method, data, received, private, server_round, momentum, weight_decay=0.1,
        momentum_state=state,
    )  # fmt: skip


def test_the_order_of_clients_never_matters(
    trainable: Method, columns: FeatureTable, dataset: ImageDataset
) -> None:
    method, data = trainable, clients(columns, dataset)
    received, private = starts(method, data)
    forth = train(method, data, received, private)
    back = train(method, data[::-1], received[::-1], private[::-1])[::-1]
    for a, b in zip(forth, back, strict=True):
        assert a.client == b.client
        for n in a.shared:
            assert torch.equal(a.shared[n], b.shared[n]), n
        for n in a.private:
            assert torch.equal(a.private[n], b.private[n]), n


LARGE_STARTS = {"pre_forgettable": 0.1}
"""Methods whose tensors start from N(0, 1), and a learning rate that moves these in few steps."""


def test_loss_falls(trainable: Method, columns: FeatureTable, dataset: ImageDataset) -> None:
    method, data = trainable, clients(columns, dataset)[1:2]
    server, private = Server(method, data), first_private(method, data)
    losses = []
    for server_round in range(1, 13):
        lr = LARGE_STARTS.get(method.name, 0.003)
        settings = {"optimizer": "adam", "lr": lr, "batch_size": 12}
        received = server.send(server_round, data)
        results = train(method, data, received, private, server_round, **settings)
        server.collect(server_round, results)
        private = [r.private for r in results]
        losses.append(results[0].losses["loss"])
    assert np.mean(losses[-3:]) < np.mean(losses[:3]), losses
