"""The routing of tokens against plain loops, and what the feature cache holds of it."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedprompt.backbone.token_routing import (
    PASSES,
    STEP,
    TOLERANCE,
    TokenRouting,
    clusters,
    expert_weights,
    orthogonal_keys,
    routing_encoder,
)
from fedprompt.data.features.table import encode_inputs, open_feature_table
from fedprompt.errors import UserError
from tests.support.builders import fake_dataset, random_clip, random_resnet_clip


def plain_clusters(
    tokens: Tensor, start: list[int], capacity: float
) -> tuple[Tensor, list[int], int]:
    """Centroids, sizes and number of passes, one token after the other."""
    count = len(start)
    room = [int(len(tokens) // count * capacity) + (q < len(tokens) % count) for q in range(count)]
    centroids, price = tokens[start].clone(), [0.0] * count
    for number in range(1, PASSES + 1):
        distances = torch.stack([(tokens - c).norm(dim=-1) for c in centroids], dim=1)
        asks = []
        for p, row in enumerate(distances.tolist()):
            costs = [d + price[q] for q, d in enumerate(row)]
            asks.append((min(costs), p, costs.index(min(costs))))
        members: list[list[int]] = [[] for _ in start]
        for _, p, q in sorted(asks):
            if len(members[q]) < room[q]:
                members[q].append(p)
        new = []
        for q, own in enumerate(members):
            price[q] += STEP * (len(own) - room[q])
            if own:
                new.append(tokens[own].mean(0))
            else:
                new.append(tokens[int(distances.min(1).values.argmax())])
                price[q] = 0.0
        sizes = [len(own) for own in members]
        if float((torch.stack(new) - centroids).norm(dim=1).mean()) < TOLERANCE:
            return centroids, sizes, number
        centroids = torch.stack(new)
    return centroids, sizes, PASSES


@pytest.mark.parametrize("capacity", [1.0, 1.2, 2.0])
def test_clusters_are_those_of_loops(capacity: float) -> None:
    tokens = torch.randn(4, 21, 6, generator=torch.Generator().manual_seed(1))
    # Two equal tokens are the first centroids of one image, so that a cluster is empty.
    tokens[1, 3] = tokens[1, 5]
    start = [5, 3, 17, 0]
    centroids, sizes = clusters(tokens, torch.tensor(start), capacity)
    passes = set()
    for b, image in enumerate(tokens):
        theirs, counts, number = plain_clusters(image, start, capacity)
        assert sizes[b].tolist() == counts
        torch.testing.assert_close(centroids[b], theirs, rtol=1e-4, atol=1e-5)
        passes.add(number)
    assert len(passes) > 1, "images come to rest at different times"


def test_weights_are_those_of_the_best_of_all_matches() -> None:
    draws = torch.Generator().manual_seed(2)
    centroids, keys = torch.randn(3, 4, 6, generator=draws), orthogonal_keys(5, 6)
    sizes = torch.tensor([[3.0, 5, 1, 1], [0, 2, 2, 6], [4, 4, 4, 4]])
    weights = expert_weights(centroids, sizes, keys)
    cosines = torch.cosine_similarity(centroids[:, :, None], keys[None, None], dim=-1)
    for b in range(3):
        best = max(permutations(range(5), 4), key=lambda to: sum(cosines[b, range(4), to]))
        expected = torch.zeros(5)
        expected[list(best)] = sizes[b] / sizes[b].sum()
        torch.testing.assert_close(weights[b], expected)


@pytest.mark.parametrize(("experts", "width"), [(4, 9), (9, 4)])
def test_keys_are_orthonormal_and_always_the_same(experts: int, width: int) -> None:
    keys = orthogonal_keys(experts, width)
    assert keys.shape == (experts, width)
    product = keys @ keys.T if experts < width else keys.T @ keys
    torch.testing.assert_close(product, torch.eye(min(experts, width)), atol=1e-5, rtol=0)
    assert torch.equal(keys, orthogonal_keys(experts, width))


def test_rows_depend_on_the_image_and_the_numbers_alone(tmp_path: Path) -> None:
    clip, routing = random_clip(), TokenRouting(4, 1.0, 2.0)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    together = encode_inputs(clip, images, {"routing"}, routing).routing
    assert together is not None
    assert together.shape == (3, 2, 4)
    torch.testing.assert_close(together.sum(-1), torch.ones(3, 2))
    encode = routing_encoder(clip, routing)
    assert encode is not None
    torch.testing.assert_close(encode(images[1:2])[0], together[1])
    # 17 tokens: in training, no cluster has more than 4, or 5 for the one with the remainder.
    assert float(together[:, 0].max()) <= 5 / 12
    dataset = fake_dataset(images=4)
    table = open_feature_table(
        clip, dataset, tmp_path, {"routing"}, routing=routing, progress=False
    )
    found = table.rows(np.arange(4))
    assert found.routing is not None
    assert found.routing.shape == (4, 2, 4)
    others = [TokenRouting(4, 1.0, 1.5), TokenRouting(4, 1.5, 2.0), TokenRouting(5, 1.0, 2.0)]
    assert len({routing.view, *(other.view for other in others)}) == 4


def test_a_resnet_has_no_tokens_to_route() -> None:
    images = torch.zeros(1, 3, 64, 64)
    with pytest.raises(UserError, match="backbone: resnet has no tokens"):
        encode_inputs(random_resnet_clip(), images, {"routing"}, TokenRouting(4, 1.0, 2.0))
