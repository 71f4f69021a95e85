"""A client's memory of images: what it holds, and how it votes, by loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.bench.workload import Sizes, make_workspace
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import ClientData, row_of, stack
from fedprompt.methods.parts.feature_memory import empty_memory, fill_memory, recall
from fedprompt.runtime.allocations import Allocations
from fedprompt.scoring import encode_personal, score_each
from fedprompt.workspace import check_private
from tests.support import twins

D, C, S = 8, 3, 2


def client(labels: list[int], views: int = 1, number: int = 0) -> ClientData:
    count = len(labels) * views
    return ClientData(number, Inputs(twins.features(1, count, D)[0]), torch.tensor(labels), views)


def rows(memory: dict[str, Tensor], c: int) -> list[list[float]]:
    pairs = zip(memory["keys"], memory["owners"], strict=True)
    return [key.tolist() for key, owner in pairs if owner == c + 1]


def test_it_holds_the_clients_own_images_by_class() -> None:
    data = client([2, 0, 2])
    memory = fill_memory(empty_memory(D), data, S, seed=1)
    features = data.inputs.features
    assert rows(memory, 0) == [features[1].tolist()]
    assert rows(memory, 1) == []
    assert sorted(rows(memory, 2)) == sorted([features[0].tolist(), features[2].tolist()])
    assert memory["owners"].tolist() == [1, 3, 3]
    assert memory["keys"].shape == (3, D)


def test_more_images_than_slots_are_drawn_by_seed_and_client() -> None:
    labels = [0] * 30
    chosen = {
        (seed, number): str(
            rows(fill_memory(empty_memory(D), client(labels, number=number), S, seed), 0)
        )
        for seed in (1, 2)
        for number in (0, 1)
    }
    assert len(set(chosen.values())) == 4
    again = fill_memory(empty_memory(D), client(labels), S, 1)
    assert len(again["keys"]) == S
    assert str(rows(again, 0)) == chosen[1, 0]


def test_augmented_views_are_averaged_and_normalised() -> None:
    data = client([0, 1], views=3)
    memory = fill_memory(empty_memory(D), data, S, seed=1)
    views = data.inputs.features.reshape(3, 2, D)
    for i in range(2):
        mean = (views[1, i] + views[2, i]) / 2
        assert torch.allclose(memory["keys"][i], mean / mean.norm(), atol=1e-6)


@pytest.mark.parametrize("beta", [1.0, 5.5])
def test_votes_by_hand(beta: float) -> None:
    """The second client has fewer images, and none of class 2."""
    keys = F.normalize(twins.draw(2, 5, D), dim=-1)
    owners = torch.tensor([[1.0, 1.0, 2.0, 3.0, 3.0], [1.0, 2.0, 2.0, 0.0, 0.0]])
    keys[1, 3:] = 0
    features = twins.features(2, 4, D, seed=1)
    votes = recall(features, keys, owners, beta, C)
    assert votes.shape == (2, 4, C)
    for k in range(2):
        for b in range(4):
            for c in range(C):
                expected = sum(
                    math.exp(-beta * (1 - float(features[k, b] @ keys[k, n])))
                    for n in range(5)
                    if owners[k, n] == c + 1
                )
                assert votes[k, b, c].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert (votes[1, :, 2] == 0).all()


def test_the_padding_of_a_block_says_nothing() -> None:
    memories = [
        fill_memory(empty_memory(D), client(labels, number=k), S, seed=1)
        for k, labels in enumerate([[2, 0, 2], [1]])
    ]
    together, features = stack(memories), twins.features(2, 4, D, seed=1)
    assert together["keys"].shape == (2, 3, D)
    votes = recall(features, together["keys"], together["owners"], 1.0, C)
    for k, memory in enumerate(memories):
        assert torch.equal(row_of(together["keys"], k, memory["keys"]), memory["keys"])
        alone = stack([memory])
        expected = recall(features[k : k + 1], alone["keys"], alone["owners"], 1.0, C)
        assert torch.allclose(votes[k], expected[0], rtol=1e-6, atol=1e-7)


def test_one_memory_for_several_clients_and_one_set_for_several_memories() -> None:
    keys, owners = F.normalize(twins.draw(2, 5, D), dim=-1), torch.ones(2, 5)
    features = twins.features(2, 4, D, seed=1)
    assert torch.allclose(
        recall(features, keys[:1], owners[:1], 1.0, C)[1],
        recall(features[1:], keys[:1], owners[:1], 1.0, C)[0],
    )
    assert recall(features[:1], keys, owners, 1.0, C).shape == (2, 4, C)


def test_memories_of_another_version_are_refused_with_their_names(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "pfedprompt")
    check_private(method, fill_memory(empty_memory(clip.embed_dim), of(clip, [1, 2]), S, 1), 1)
    table = {"keys": torch.zeros(6, 16, clip.embed_dim), "filled": torch.zeros(6, 16)}
    with pytest.raises(UserError, match=r"'filled'.*'pfedprompt'.*'owners'.*another version"):
        check_private(method, table, 1)


def of(clip: FrozenCLIP, labels: list[int]) -> ClientData:
    features = twins.features(1, len(labels), clip.embed_dim)[0]
    return ClientData(0, Inputs(features), torch.tensor(labels))


def test_the_memory_of_an_evaluation_follows_the_images(clip: FrozenCLIP) -> None:
    """A table of classes x shots would take 100 classes x 16 shots x 128 bytes per client."""
    clients = 20
    workspace = make_workspace(
        clip,
        [f"class {c}" for c in range(100)],
        Sizes(clients, train=5, test=2),
        method={"name": "tip_adapter"},
    )
    messages = [workspace.start_private(client) for client in range(clients)]
    stored = sum(t.numel() for memory in messages for t in memory.values())
    assert stored == clients * 5 * (clip.embed_dim + 1)
    with Allocations() as made:
        encoded = encode_personal(workspace.method, [{}] * clients, messages)
        score_each(workspace.method, encoded, [workspace.test_data(c) for c in range(clients)])
    assert made.peak < clients * 100 * 16 * 4 * clip.embed_dim / 10
