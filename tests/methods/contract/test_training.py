"""What every method promises about local training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.features.table import FeatureTable
from fedprompt.methods.base import Method
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
        assert shapes(result.private) == shapes(method.init_private(1, 0))
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


def test_clients_at_once_equal_one_at_a_time(
    trainable: Method, columns: FeatureTable, dataset: ImageDataset
) -> None:
    """The sizes differ, so this also shows that padded batches change nothing."""
    method, data = trainable, clients(columns, dataset)
    server, private = Server(method, data), first_private(method, data)
    for server_round in (1, 2):
        received = server.send(server_round, data)
        together = train(method, data, received, private, server_round)
        for k, one in enumerate(data):
            alone = train(method, [one], [received[k]], [private[k]], server_round)[0]
            assert alone.losses == pytest.approx(together[k].losses, rel=1e-3, abs=1e-5)
            assert_close(together[k].shared, alone.shared, received[k], 1e-3)
            assert_close(together[k].private, alone.private, private[k], 1e-3)
        server.collect(server_round, together)
        private = [r.private for r in together]


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


def test_loss_falls(trainable: Method, columns: FeatureTable, dataset: ImageDataset) -> None:
    method, data = trainable, clients(columns, dataset)[1:2]
    server, private = Server(method, data), first_private(method, data)
    losses = []
    for server_round in range(1, 13):
        settings = {"optimizer": "adam", "lr": 0.003, "batch_size": 12}
        received = server.send(server_round, data)
        results = train(method, data, received, private, server_round, **settings)
        server.collect(server_round, results)
        private = [r.private for r in results]
        losses.append(results[0].losses["loss"])
    assert np.mean(losses[-3:]) < np.mean(losses[:3]), losses
