"""The reference implementation: equal to open_clip's own towers, and to our text tower."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_tokens import context_init
from fedprompt.backbone.text_tower import TextTower
from fedprompt.bench.reference import (
    ReferenceClient,
    ReferenceCoOp,
    reference_class_features,
    reference_evaluate,
    reference_federation,
    reference_local_training,
)
from fedprompt.config.schema import TrainingConfig
from tests.support.builders import CLASS_NAMES

SGD = TrainingConfig(optimizer="sgd", lr=0.05, batch_size=4)


def images_of(clip: FrozenCLIP, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=generator)


def clients_of(clip: FrozenCLIP, sizes: Sequence[int]) -> list[ReferenceClient]:
    clients = []
    for k, n in enumerate(sizes):
        images = images_of(clip, n + 2, seed=k)
        labels = torch.arange(n + 2) % len(CLASS_NAMES)
        clients.append(ReferenceClient(k, images[:n], labels[:n], images[n:], labels[n:]))
    return clients


def photo_context(clip: FrozenCLIP) -> Tensor:
    return context_init(clip, "a photo of a", 4, torch.empty(0))


def test_hard_prompts_give_open_clips_own_logits(clip: FrozenCLIP) -> None:
    model = ReferenceCoOp(clip, CLASS_NAMES, photo_context(clip))
    images = images_of(clip, 3)
    text = F.normalize(clip.encode_text_raw([f"a photo of a {n}." for n in CLASS_NAMES]), dim=-1)
    expected = clip.logit_scale * F.normalize(clip.encode_images(images), dim=-1) @ text.T
    assert torch.allclose(model(images), expected, rtol=1e-5, atol=1e-5)


def test_class_features_are_those_of_the_plain_tower(clip: FrozenCLIP) -> None:
    context = 0.02 * torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    model = ReferenceCoOp(clip, CLASS_NAMES, context)
    expected = F.normalize(
        reference_class_features(TextTower(clip, CLASS_NAMES, 4), context), dim=-1
    )
    assert torch.allclose(model.class_features(), expected, rtol=1e-5, atol=1e-6)


def test_only_the_context_is_trained(clip: FrozenCLIP) -> None:
    model = ReferenceCoOp(clip, CLASS_NAMES, photo_context(clip))
    before = {n: p.clone() for n, p in model.named_parameters()}
    (client,) = clients_of(clip, [6])
    reference_local_training(model, client, SGD, seed=1, server_round=1, rounds=3)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"context"}


def test_one_step_is_gradient_descent(clip: FrozenCLIP) -> None:
    start = photo_context(clip)
    model = ReferenceCoOp(clip, CLASS_NAMES, start)
    (client,) = clients_of(clip, [4])
    expected = copy.deepcopy(model)
    loss = F.cross_entropy(expected(client.train_images), client.train_labels)
    (gradient,) = torch.autograd.grad(loss, expected.context)
    config = replace(SGD, weight_decay=0.0)
    mean_loss = reference_local_training(model, client, config, seed=1, server_round=1, rounds=3)
    assert mean_loss == pytest.approx(float(loss.detach()), rel=1e-6)
    assert torch.allclose(model.context, start - SGD.lr * gradient, atol=1e-7)


def test_evaluation_does_not_depend_on_the_batch(clip: FrozenCLIP) -> None:
    model = ReferenceCoOp(clip, CLASS_NAMES, photo_context(clip))
    images, labels = images_of(clip, 7), torch.arange(7) % len(CLASS_NAMES)
    whole, parts = (reference_evaluate(model, images, labels, n) for n in (7, 3))
    assert (whole.correct, whole.tested) == (parts.correct, 7)
    assert parts.loss_sum == pytest.approx(whole.loss_sum, rel=1e-5)
    logits = model(images).detach()
    assert whole.correct == int((logits.argmax(-1) == labels).sum())
    assert whole.loss_sum == pytest.approx(
        float(F.cross_entropy(logits, labels, reduction="sum")), rel=1e-5
    )


def test_a_round_is_the_average_of_clients_weighted_by_images(clip: FrozenCLIP) -> None:
    clients = clients_of(clip, [6, 2])
    model = ReferenceCoOp(clip, CLASS_NAMES, photo_context(clip))
    alone = []
    for client in clients:
        local = copy.deepcopy(model)
        reference_local_training(local, client, SGD, seed=1, server_round=1, rounds=1)
        alone.append(local.context.detach())
    server = clients[0].test_images, clients[0].test_labels
    start, done = reference_federation(model, clients, server, SGD, seed=1, rounds=1, test_batch=2)
    assert torch.allclose(done.context, (6 * alone[0] + 2 * alone[1]) / 8, atol=1e-7)
    assert start.losses == []
    assert len(done.losses) == 2
    assert [s.tested for s in done.personal_scores] == [2, 2]
    assert done.global_score == done.personal_scores[0] != start.global_score
