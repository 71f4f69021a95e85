"""A client's memory of images: what it holds, and how it votes, by loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import ClientData
from fedprompt.methods.parts.feature_memory import empty_memory, fill_memory, recall
from tests.support import twins

D, C, S = 8, 3, 2


def client(labels: list[int], views: int = 1, number: int = 0) -> ClientData:
    count = len(labels) * views
    return ClientData(number, Inputs(twins.features(1, count, D)[0]), torch.tensor(labels), views)


def rows(memory: dict[str, Tensor], c: int) -> list[list[float]]:
    return [k.tolist() for k, f in zip(memory["keys"][c], memory["filled"][c], strict=True) if f]


def test_it_holds_the_clients_own_images_by_class() -> None:
    data = client([2, 0, 2])
    memory = fill_memory(empty_memory(C, S, D), data, seed=1)
    features = data.inputs.features
    assert rows(memory, 0) == [features[1].tolist()]
    assert rows(memory, 1) == []
    assert sorted(rows(memory, 2)) == sorted([features[0].tolist(), features[2].tolist()])
    assert memory["filled"].tolist() == [[1, 0], [0, 0], [1, 1]]
    assert not memory["keys"][0, 1].any()
    assert memory["keys"].shape == (C, S, D)


def test_more_images_than_slots_are_drawn_by_seed_and_client() -> None:
    labels = [0] * 30
    chosen = {
        (seed, number): str(
            rows(fill_memory(empty_memory(C, S, D), client(labels, number=number), seed), 0)
        )
        for seed in (1, 2)
        for number in (0, 1)
    }
    assert len(set(chosen.values())) == 4
    again = fill_memory(empty_memory(C, S, D), client(labels), 1)
    assert str(rows(again, 0)) == chosen[1, 0]


def test_augmented_views_are_averaged_and_normalised() -> None:
    data = client([0, 1], views=3)
    memory = fill_memory(empty_memory(C, S, D), data, seed=1)
    views = data.inputs.features.reshape(3, 2, D)
    for i in range(2):
        mean = (views[1, i] + views[2, i]) / 2
        assert torch.allclose(memory["keys"][i, 0], mean / mean.norm(), atol=1e-6)


@pytest.mark.parametrize("beta", [1.0, 5.5])
def test_votes_by_hand(beta: float) -> None:
    keys, filled = F.normalize(twins.draw(2, C, S, D), dim=-1), torch.ones(2, C, S)
    filled[0, 1, 1] = filled[1, 2] = 0
    features = twins.features(2, 4, D, seed=1)
    votes = recall(features, keys, filled, beta)
    assert votes.shape == (2, 4, C)
    for k in range(2):
        for b in range(4):
            for c in range(C):
                expected = sum(
                    math.exp(-beta * (1 - float(features[k, b] @ keys[k, c, s])))
                    for s in range(S)
                    if filled[k, c, s]
                )
                assert votes[k, b, c].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert (votes[1, :, 2] == 0).all()


def test_one_memory_for_several_clients_and_one_set_for_several_memories() -> None:
    keys, filled = F.normalize(twins.draw(2, C, S, D), dim=-1), torch.ones(2, C, S)
    features = twins.features(2, 4, D, seed=1)
    assert torch.allclose(
        recall(features, keys[:1], filled[:1], 1.0)[1],
        recall(features[1:], keys[:1], filled[:1], 1.0)[0],
    )
    assert recall(features[:1], keys, filled, 1.0).shape == (2, 4, C)
