"""PALM: twin of the mixture, its shares of classes, and that no text is encoded in training."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.methods.base import Task, uploaded_numbers
from tests.support import twins
from tests.support.twins import K


def test_twin(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "palm")
    shared, batch = twins.tensors(method, 0.3)[0], twins.batch(clip)
    before = clip.positions_encoded
    encoded = method.encode(shared, {})
    logits, terms = method.logits(encoded, batch.inputs), twins.loss_of(method, shared, {}, batch)
    assert clip.positions_encoded == before
    ours = twins.applied_gradients(method, shared, batch)
    assert set(ours) == {"vectors", "lambdas"}
    fixed = twins.template_features(clip)
    for k in range(K):
        own = {n: shared[n][k].detach().requires_grad_() for n in ours}
        rows = []
        for t, e, lam in zip(fixed, own["vectors"], own["lambdas"], strict=True):
            mix = 1 / (1 + torch.exp(-lam))
            row = (1 - mix) * t + mix * e
            rows.append(row / row.norm())
        images, labels = twins.images_of(batch, k)
        expected = clip.logit_scale * images @ torch.stack(rows).T
        twins.close(logits[k][batch.mask_KB[k]], expected, "logits")
        loss = F.cross_entropy(expected, labels)
        twins.close(terms["ce"][k], loss, "loss")
        for n, theirs in zip(own, torch.autograd.grad(loss, list(own.values())), strict=True):
            twins.close(ours[n][k], theirs, n)


def test_start_and_shares(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "palm", Task(tuple(f"class number {i}" for i in range(60))))
    start = method.init_shared(1)
    assert float(start["vectors"].std()) == pytest.approx(0.02, rel=0.1)
    assert 0 <= float(start["lambdas"].min()) < 0.2 < 0.8 < float(start["lambdas"].max()) < 1
    small = twins.build(clip, "palm")
    shared, info = twins.tensors(small)[0], twins.batch(clip).round_info
    sent, _ = small.end_round(shared, {}, info)
    assert sent["class_shares"][0].tolist() == pytest.approx([0.2, 0.4, 0, 0.2, 0, 0.2])
    assert math.isclose(float(sent["class_shares"].sum()), K, rel_tol=1e-5)
    assert dict(small.config.default_strategy) == {"name": "per_class"}


def test_upload_on_vit_b16() -> None:
    method = twins.build(shape_only_clip("ViT-B-16"), "palm")
    assert uploaded_numbers(method) == 6 * (512 + 2)


def test_bad_options(clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match="init_std"):
        twins.build(clip, "palm", init_std=0)
