"""ProDA: the bound from every class pair's covariance, orthogonality, the random order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.errors import UserError
from tests.support import twins
from tests.support.builders import CLASS_NAMES
from tests.support.twins import K

SMALL = {"contexts": 8, "contexts_per_step": 4, "context_tokens": 4}
POSITIONS = ["front"] * 2 + ["middle"] * 2 + ["end"] * 4


def bound(clip: FrozenCLIP, features_PCD: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """The enlarged logits from the covariance (C, C) of class features in each dimension."""
    count, scale = len(features_PCD), clip.model.logit_scale.exp()
    mean_CD = features_PCD.mean(0)
    spread_PCD = features_PCD - mean_CD
    covariance_DCC = torch.einsum("pid,pjd->dij", spread_PCD, spread_PCD) / (count + 1)
    logits = scale * images @ mean_CD.T
    rows = []
    for image, y, row in zip(images, labels.tolist(), logits, strict=True):
        gained = []
        for c in range(len(CLASS_NAMES)):
            pair = covariance_DCC[:, y, y] + covariance_DCC[:, c, c] - 2 * covariance_DCC[:, y, c]
            gained.append((image**2 * pair).sum() * scale**2 / 2)
        rows.append(row + torch.stack(gained))
    return torch.stack(rows)


@pytest.mark.parametrize("step", [0, 1])
def test_twin(clip: FrozenCLIP, step: int) -> None:
    method: Any = twins.build(clip, "proda", **SMALL)
    assert method.positions == POSITIONS
    shared, batch = twins.tensors(method)[0], twins.batch(clip, step=step)
    chosen = method.step_contexts(batch)
    encoded = method.encode(shared, {})
    logits, loss_terms = (
        method.logits(encoded, batch.inputs),
        method.loss_terms(shared, {}, encoded, batch),
    )
    ours = twins.applied_gradients(method, shared, batch)["ctx"]
    for k in range(K):
        contexts = shared["ctx"][k].detach().requires_grad_()
        features = torch.stack(
            [twins.class_features(clip, c, p) for c, p in zip(contexts, POSITIONS, strict=True)]
        )
        images, labels = twins.images_of(batch, k)
        mean_logits = clip.model.logit_scale.exp() * images @ features.mean(0).T
        twins.close(logits[k][batch.mask_KB[k]], mean_logits, "logits")
        ce = F.cross_entropy(bound(clip, features[chosen], images, labels), labels)
        twins.close(loss_terms["ce"][k], ce, "ce")
        bare = torch.stack([twins.text_feature(clip, c, "") for c in contexts])
        pairs = [(bare[i] @ bare[j]).abs() for i in range(8) for j in range(8) if i != j]
        apart = 0.1 * torch.stack(pairs).mean()
        twins.close(loss_terms["orthogonality"][k], apart, "orthogonality")
        (theirs,) = torch.autograd.grad(ce + apart, [contexts])
        twins.close(ours[k], theirs, "gradient")


def test_the_bound_is_above_the_expected_loss(clip: FrozenCLIP) -> None:
    """Over draws of all class features with the contexts' covariance in each dimension."""
    method: Any = twins.build(clip, "proda", **SMALL, orthogonality=0.0)
    shared, batch = twins.tensors(method, 0.2)[0], twins.batch(clip)
    features = method._features(shared["ctx"].detach(), method.step_contexts(batch))
    ce = method.loss_terms(shared, {}, method.encode(shared, {}), batch)["ce"]
    noise = torch.Generator().manual_seed(3)
    for k in range(K):
        images, labels = twins.images_of(batch, k)
        mean = features[k].mean(0)
        spread = (features[k] - mean) / (len(features[k]) + 1) ** 0.5
        losses = []
        for _ in range(500):
            weights = torch.randn(len(spread), clip.embed_dim, generator=noise)
            draw = mean + torch.einsum("pd,pcd->cd", weights, spread)
            losses.append(F.cross_entropy(clip.logit_scale * images @ draw.T, labels))
        plain = F.cross_entropy(clip.logit_scale * images @ mean.T, labels)
        assert plain < torch.stack(losses).mean() < ce[k]


def test_a_round_takes_every_context_once_per_turn(clip: FrozenCLIP) -> None:
    method: Any = twins.build(clip, "proda", **SMALL)

    def order(server_round: int) -> list[list[int]]:
        return [
            method.step_contexts(twins.batch(clip, step=step, server_round=server_round))
            for step in range(4)
        ]

    first, again, other = order(1), order(1), order(2)
    assert sorted(first[0] + first[1]) == sorted(first[2] + first[3]) == list(range(8))
    assert first == again
    assert first != other
    assert first[0] + first[1] != first[2] + first[3]


def test_a_step_moves_the_others_by_orthogonality_alone(clip: FrozenCLIP) -> None:
    method: Any = twins.build(clip, "proda", **SMALL, orthogonality=0.0)
    shared, batch = twins.tensors(method)[0], twins.batch(clip)
    moves = twins.applied_gradients(method, shared, batch)["ctx"].flatten(2).abs().amax(-1) > 0
    for k in range(K):
        assert torch.nonzero(moves[k]).flatten().tolist() == sorted(method.step_contexts(batch))


def test_evaluation_keeps_the_means(clip: FrozenCLIP) -> None:
    """What is encoded without a gradient is class features; the logits are those of training."""
    method, batch = twins.build(clip, "proda", **SMALL), twins.batch(clip)
    shared = twins.tensors(method)[0]
    kept = {n: t.detach() for n, t in shared.items()}
    encoded = method.encode(kept, {})
    assert encoded.keys() == {"classes"}
    embeddings = method.class_embeddings(encoded)
    assert embeddings is not None
    assert (embeddings.norm(dim=-1) < 1).all(), "a mean of unit vectors, not normalised again"
    twins.close(
        method.logits(encoded, batch.inputs), method.logits(method.encode(shared, {}), batch.inputs)
    )


def test_one_context_has_nothing_to_keep_apart(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "proda", contexts=1, contexts_per_step=1, context_tokens=4)
    shared, batch = twins.tensors(method)[0], twins.batch(clip)
    assert method.loss_terms(shared, {}, method.encode(shared, {}), batch).keys() == {"ce"}


@pytest.mark.parametrize("contexts", [1, 2, 3, 6, 7])
def test_every_context_has_a_position(clip: FrozenCLIP, contexts: int) -> None:
    method: Any = twins.build(
        clip, "proda", contexts=contexts, contexts_per_step=1, context_tokens=2
    )
    assert len(method.positions) == contexts
    assert method.init_shared(1)["ctx"].shape == (contexts, 2, clip.text.width)


def test_bad_options(clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match="multiple of contexts_per_step"):
        twins.build(clip, "proda", contexts=10, contexts_per_step=4)
