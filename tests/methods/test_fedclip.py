"""FedCLIP against torch modules and CLIP's loss written image by image."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import Tensors, uploaded_numbers
from fedprompt.methods.parts import adapters
from tests.support import twins
from tests.support.builders import CLASS_NAMES, batch_of

K, B = 2, 6
LABELS = torch.tensor([[0, 1, 1, 5, 2, 0], [3, 3, 4, 0, 1, 2]])  # classes repeat in a batch


def attended(tensors: Tensors, features_BD: Tensor) -> Tensor:
    """One client's unit features after the attention."""
    width = features_BD.shape[-1]
    net = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Softmax(1))
    own = {n.removeprefix("attention."): t for n, t in tensors.items()}
    mixed = torch.func.functional_call(net, own, (features_BD,)) * features_BD
    return mixed / mixed.norm(dim=1, keepdim=True)


def class_texts(clip: FrozenCLIP) -> Tensor:
    text = clip.encode_text_raw([f"a picture of a {name}" for name in CLASS_NAMES])
    return F.normalize(text, dim=-1)


def one(tensors: Tensors, k: int) -> Tensors:
    return {n: t[k].detach().requires_grad_() for n, t in tensors.items()}


def test_logits_are_over_classes(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedclip")
    shared, _ = twins.tensors(method, 0.3, K)
    features = twins.features(K, B, clip.embed_dim)
    ours = method.logits(method.encode(shared, {}), Inputs(features))
    for k in range(K):
        v = attended(one(shared, k), features[k])
        twins.close(ours[k], clip.model.logit_scale.exp() * v @ class_texts(clip).T)


def test_loss_and_gradients_are_clips_own_over_the_pairs_of_the_batch(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedclip")
    shared, _ = twins.tensors(method, 0.3, K)
    batch = batch_of(twins.features(K, B, clip.embed_dim), LABELS)
    loss_terms = method.loss_terms(shared, {}, method.encode(shared, {}), batch)
    found = method.gradients(loss_terms, {f"shared.{n}": t for n, t in shared.items()}, batch)
    for k in range(K):
        own = one(shared, k)
        pairs = attended(own, batch.inputs.features[k]) @ class_texts(clip)[LABELS[k]].T
        pairs = clip.model.logit_scale.exp() * pairs
        target = torch.arange(B)
        loss = (F.cross_entropy(pairs, target) + F.cross_entropy(pairs.t(), target)) / 2
        assert loss_terms["ce"][k].item() == pytest.approx(loss.item(), rel=1e-4)
        for name, grad in zip(own, torch.autograd.grad(loss, list(own.values())), strict=True):
            ours = found[f"shared.{name}"]
            assert ours is not None
            twins.close(ours[k], grad)


def test_padding_is_neither_an_anchor_nor_a_negative(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedclip")
    shared, _ = twins.tensors(method, 0.3, K)
    features = twins.features(K, B, clip.embed_dim)
    mask = torch.ones(K, B, dtype=torch.bool)
    mask[1, 3:] = False
    encoded = method.encode(shared, {})
    padded = method.loss_terms(shared, {}, encoded, batch_of(features, LABELS, mask))["ce"]
    cut_rows = {n: t[1:] for n, t in shared.items()}
    cut = method.loss_terms(
        cut_rows, {}, method.encode(cut_rows, {}), batch_of(features[1:, :3], LABELS[1:, :3])
    )
    assert padded[1].item() == pytest.approx(cut["ce"][0].item(), rel=1e-5)
    gradients = torch.autograd.grad(padded.sum(), list(shared.values()))
    assert all(bool(torch.isfinite(g).all()) for g in gradients)


def test_two_images_of_one_class_are_negatives_of_each_other(clip: FrozenCLIP) -> None:
    """The paper's loss: it cannot fall below ln 2 where a batch has one class twice alone."""
    method = twins.build(clip, "fedclip")
    shared, _ = twins.tensors(method, 0.01, 1)
    batch = batch_of(twins.features(1, 2, clip.embed_dim), torch.tensor([[4, 4]]))
    ce = method.loss_terms(shared, {}, method.encode(shared, {}), batch)["ce"]
    assert ce.item() >= math.log(2) - 1e-5
    single = batch_of(twins.features(1, 1, clip.embed_dim), torch.tensor([[4]]))
    assert method.loss_terms(shared, {}, method.encode(shared, {}), single)["ce"].item() == 0.0


def test_upload_at_512_is_525312_numbers() -> None:
    method = twins.build(shape_only_clip("ViT-B-32"), "fedclip")
    assert uploaded_numbers(method) == 2 * (512 * 512 + 512) == 525_312
    assert dict(method.config.default_strategy) == {"name": "fedavg", "weights": "uniform"}
    assert method.init_private(1, 0) == {}


def test_lengths_of_features_reach_the_attention(
    clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The public code attends to un-normalised features, and softmax is not free of scale."""
    method = twins.build(clip, "fedclip")
    shared, _ = twins.tensors(method, 0.3, 1)
    raw = 5 * twins.draw(1, B, clip.embed_dim)
    monkeypatch.setattr(
        adapters, "raw_features", lambda inputs: inputs.features * raw.norm(dim=-1, keepdim=True)
    )
    inputs = Inputs(F.normalize(raw, dim=-1))
    ours = method.logits(method.encode(shared, {}), inputs)[0]
    v = attended(one(shared, 0), raw[0])
    twins.close(ours, clip.model.logit_scale.exp() * v @ class_texts(clip).T)


def test_bad_template(clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match="template"):
        twins.build(clip, "fedclip", template="a picture")
