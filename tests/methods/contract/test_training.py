"""What every method promises about local training.

Most tests read one training of three clients for two rounds, alone and in blocks of several.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
    train,
    weights_hash,
)


class Round(NamedTuple):
    """A round: what the clients had, each one's result alone, those of blocks, and plain ones."""

    received: list[Tensors]
    private: list[Tensors]
    alone: dict[int, LocalResult]
    blocks: list[list[LocalResult]]
    plain: list[LocalResult]


@pytest.fixture(scope="module")
def two_rounds(
    trainable: Method, clip: FrozenCLIP, columns: FeatureTable, dataset: ImageDataset
) -> list[Round]:
    """In round 2 a client trains for the first time, beside two that train for the second.

    The sizes differ, so blocks have padded batches. Weight decay and the momentum that clients keep
    move every tensor of a block that the optimiser is given, also where only one client trains it.
    The others of round 2 train once more without both.
    """
    method, data = trainable, clients(columns, dataset)
    before = weights_hash(clip)
    server, private = Server(method, data), first_private(method, data)
    momentum: list[Tensors] = [{} for _ in data]
    rounds = []
    for server_round, blocks in ((1, [[0, 2]]), (2, [[0, 1, 2], [2, 1, 0]])):
        received = server.send(server_round, data)
        start = (data, received, private, momentum)
        alone = {k: _block(method, [k], start, server_round)[0] for k in blocks[0]}
        together = [_block(method, of, start, server_round) for of in blocks]
        plain = _block(method, [0, 2], (data, received, private, []), server_round)
        rounds.append(Round(received, private, alone, together, plain))
        trained = {r.client: r for r in together[0]}
        server.collect(server_round, list(trained.values()))
        private = [trained[k].private if k in trained else p for k, p in enumerate(private)]
        momentum = [trained[k].momentum if k in trained else m for k, m in enumerate(momentum)]
    assert weights_hash(clip) == before
    assert all(p.grad is None for p in clip.model.parameters())
    return rounds


def _block(
    method: Method, of: list[int], start: tuple[list[Any], ...], server_round: int
) -> list[LocalResult]:
    """Train some clients together, from everyone's data, received and private tensors and momentum.

    Without momentum there is no weight decay either, and only the loss moves tensors.
    """
    data, received, private = ([values[k] for k in of] for values in start[:3])
    changes: dict[str, Any] = {"batch_size": 8}
    if start[3]:
        changes |= {"momentum": [start[3][k] for k in of], "weight_decay": 0.1}
        changes["momentum_state"] = "keep" if method.config.keeps_momentum else "reset"
    return train(method, data, received, private, server_round, **changes)


WITHOUT_GRADIENT = {
    # A bias that all keys share leaves an attention as it is.
    "pfedmoap": {"private.gate.k.bias"},
    # What comes before a norm and is the same for all that it sees is taken out by it.
    "gopro": {"shared.g.bias", "shared.mix.bias"},
    "fedmvp": {"shared.norm_k.bias"},
    "adclip": {"shared.mix.bias"},
    # No image belongs to the last pairs of a bank with more pairs than there are classes.
    "prompt_bank": {"shared.bias.6", "shared.bias.7"},
    # Even rounds train the aggregators.
    "plan": {"shared.text", "shared.visual"},
}
"""Tensors on which no loss of a second round depends."""


def test_training_moves_prompts_and_nothing_else(
    trainable: Method, two_rounds: list[Round]
) -> None:
    """Those who train for the second time; the fixture has looked at the backbone's weights."""
    method, (first, second) = trainable, two_rounds
    still = method.frozen | WITHOUT_GRADIENT.get(method.name, set())
    empty = shapes(method.init_private(1, 0))
    for own in first.private:
        # An axis of 0 becomes as long as a client has images.
        assert empty == {
            n: s if empty[n][:1] != (0,) else (0, *s[1:]) for n, s in shapes(own).items()
        }
    for result in second.plain:
        k = result.client
        received, private = second.received[k], second.private[k]
        assert shapes(result.shared) == shapes(method.init_shared(1))
        assert shapes(result.private) == shapes(private) == shapes(first.private[k])
        start = {f"shared.{n}": received[n] for n in result.shared}
        start |= {f"private.{n}": t for n, t in private.items()}
        last = {f"shared.{n}": t for n, t in result.shared.items()}
        last |= {f"private.{n}": t for n, t in result.private.items()}
        for n, t in last.items():
            assert t.dtype == torch.float32
            assert torch.isfinite(t).all(), n
            assert n in still or not torch.equal(t, start[n]), f"{n} does not learn"
        expected = ["ce"] if start.keys() - method.frozen else []
        assert [*result.losses][:1] == expected or method.config.learns_without_labels
        assert all(np.isfinite(v) for v in result.losses.values())


def test_results_are_equal_for_every_block_size(two_rounds: list[Round]) -> None:
    for received, private, alone, blocks, _ in two_rounds:
        for ours in (result for block in blocks for result in block):
            k = ours.client
            assert alone[k].losses == pytest.approx(ours.losses, rel=1e-3, abs=1e-5)
            assert_close(ours.shared, alone[k].shared, received[k], 1e-3)
            assert_close(ours.private, alone[k].private, private[k], 1e-3)


def test_the_order_of_clients_never_matters(two_rounds: list[Round]) -> None:
    forth, back = two_rounds[1].blocks
    for a, b in zip(forth, back[::-1], strict=True):
        assert a.client == b.client
        for ours, theirs in (
            (a.shared, b.shared),
            (a.private, b.private),
            (a.momentum, b.momentum),
        ):
            assert ours.keys() == theirs.keys()
            for n in ours:
                assert torch.equal(ours[n], theirs[n]), n


LARGE_STARTS = {"pre_forgettable": 0.1}
"""Methods whose tensors start from N(0, 1), and a learning rate that moves these in few steps."""

ADVERSARIAL = {"spg": "ce"}
"""Methods with two sides that play against each other, and the loss of theirs that falls."""


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
        if not results[0].losses:
            pytest.skip(f"{method.name} computes its tensors and trains none")
        losses.append(results[0].losses[ADVERSARIAL.get(method.name, "loss")])
    assert np.mean(losses[-3:]) < np.mean(losses[:3]), losses
