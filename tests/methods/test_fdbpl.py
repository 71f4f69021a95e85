"""FDBPL: twin of the loss, region by region; the code's PCD is zero; no label is used."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.methods.base import UNLABELLED, uploaded_numbers
from fedprompt.methods.fdbpl import ENSEMBLE
from tests.support import twins
from tests.support.twins import K


def teacher(clip: FrozenCLIP) -> Tensor:
    """The teacher's class features (C, D), template by template."""
    return F.normalize(sum(twins.template_features(clip, t) for t in ENSEMBLE), dim=-1)


def pairs(differences: list[Tensor]) -> list[Tensor]:
    """d_i - d_j of all ordered pairs."""
    return [a - b for i, a in enumerate(differences) for j, b in enumerate(differences) if i != j]


def twin_loss(
    clip: FrozenCLIP, positive: Tensor, negative: Tensor, images: Tensor, pcd: float
) -> Tensor:
    """The loss of one client, image by image and class by class."""
    plus, minus = twins.class_features(clip, positive), twins.class_features(clip, negative)
    fixed, scale, total, seen = teacher(clip), clip.logit_scale, 0.0, set()
    for image in images:
        z_t, z_p, z_m = (scale * rows @ image for rows in (fixed, plus, minus))
        p_t, p_p, p_m = (z.softmax(0) for z in (z_t, z_p, z_m))
        entropy = -sum(p * math.log(p + 1e-6) for p in p_t.tolist())
        w = 1 - entropy / math.log(len(fixed))
        there = sum(t * (t.log() - s.log()) for t, s in zip(p_t, p_p, strict=True))
        back = sum(s * (s.log() - t.log()) for t, s in zip(p_t, p_p, strict=True))
        undecided = sum(p * p.log() for p in p_m)
        cosine = z_p @ z_m / (z_p.norm() * z_m.norm())
        total += w * (there + back) / 2 + (1 - w) * undecided + 1e-3 * w * cosine
        seen.add(int(z_t.argmax()))
    total = total / len(images)
    found = pairs([plus[c] - minus[c] for c in sorted(seen)])
    if pcd and found:
        total = total + pcd * torch.stack([p.square().mean() for p in found]).mean()
    return total


@pytest.mark.parametrize("pcd", [0.0, 0.1])
def test_twin(clip: FrozenCLIP, pcd: float) -> None:
    method = twins.build(clip, "fdbpl", pcd_weight=pcd)
    shared, batch = twins.tensors(method)[0], twins.batch(clip)
    loss_terms = twins.loss_of(method, shared, {}, batch)
    ours = twins.applied_gradients(method, shared, batch)
    names = ["ce", "distill", "negative", "cosine"]
    assert list(loss_terms) == (names if pcd == 0 else [*names, "pcd"])
    assert not loss_terms["ce"].any()
    for k in range(K):
        own = {n: shared[n][k].detach().requires_grad_() for n in ("ctx", "negative")}
        loss = twin_loss(clip, own["ctx"], own["negative"], twins.images_of(batch, k)[0], pcd)
        twins.close(torch.stack([t[k] for t in loss_terms.values()]).sum(), loss, "loss")
        for n, theirs in zip(own, torch.autograd.grad(loss, list(own.values())), strict=True):
            twins.close(ours[n][k], theirs, n)


def test_the_code_s_pcd_is_zero_for_every_prompt() -> None:
    differences = list(twins.draw(4, 8))
    assert abs(float(torch.stack([p.mean() for p in pairs(differences)]).sum())) < 1e-6


def test_clients_do_not_touch_each_other(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fdbpl", pcd_weight=0.1, label_weight=0.5)
    twins.assert_clients_alone_agree(method, *twins.tensors(method), twins.batch(clip))


def test_labels_are_used_only_where_they_are_asked_for(clip: FrozenCLIP) -> None:
    batch = twins.batch(clip)
    blind = dataclasses.replace(batch, labels_KB=torch.full_like(batch.labels_KB, UNLABELLED))
    without = twins.build(clip, "fdbpl")
    shared = twins.tensors(without)[0]
    for name, term in twins.loss_of(without, shared, {}, batch).items():
        assert torch.equal(term, twins.loss_of(without, shared, {}, blind)[name])
    with_labels = twins.build(clip, "fdbpl", label_weight=0.5)
    ce = twins.loss_of(with_labels, shared, {}, batch)["ce"]
    images, labels = twins.images_of(batch, 1)
    classes = twins.class_features(clip, shared["ctx"][1])
    twins.close(ce[1], 0.5 * F.cross_entropy(clip.logit_scale * images @ classes.T, labels))
    assert not twins.loss_of(with_labels, shared, {}, blind)["ce"].any()


def test_evaluation_encodes_the_positive_prompt_alone(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fdbpl")
    shared = {n: t[None] for n, t in method.init_shared(1).items()}
    with torch.no_grad():
        assert set(method.encode(shared, None)) == {"classes"}
    assert not torch.equal(shared["ctx"], shared["negative"])


def test_upload_on_vit_b16() -> None:
    assert uploaded_numbers(twins.build(shape_only_clip("ViT-B-16"), "fdbpl")) == 4_096


@pytest.mark.parametrize(
    "options", [{"teacher_templates": []}, {"teacher_templates": ["no place"]}, {"pcd_weight": -1}]
)
def test_bad_options(clip: FrozenCLIP, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        twins.build(clip, "fdbpl", **options)
