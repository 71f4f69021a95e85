"""FedPGP against an independent twin: the contrast class by class, the plain text pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.methods.base import uploaded_numbers
from tests.support import twins
from tests.support.builders import CLASS_NAMES
from tests.support.twins import K

OPTIONS: dict[str, Any] = {"context_tokens": 3, "bottleneck": 2}


@pytest.mark.parametrize("k", range(K))
def test_logits_loss_and_gradients_are_the_twins(clip: FrozenCLIP, k: int) -> None:
    method = twins.build(clip, "fedpgp", mu=0.7, temperature=0.2, **OPTIONS)
    shared, private = twins.tensors(method)
    data = twins.one_client(twins.batch(clip), k)
    s, p = twins.row(shared, k), twins.row(private, k)
    sigma, u, v = (
        t.detach()[k].clone().requires_grad_()
        for t in (shared["sigma"], private["U"], private["V"])
    )
    untuned = clip.encode_text_raw([f"X X X {name}." for name in CLASS_NAMES])
    t_sigma, t_full = twins.class_features(clip, sigma), twins.class_features(clip, sigma + u @ v)
    expected = clip.logit_scale * data.inputs.features[0] @ t_full.T
    twins.close(method.logits(method.encode(s, p), data.inputs)[0], expected)
    contrast = torch.tensor(0.0)
    for c in range(len(CLASS_NAMES)):
        positive = (F.cosine_similarity(untuned[c], t_sigma[c], dim=0) / 0.2).exp()
        negative = (F.cosine_similarity(t_sigma[c], t_full[c], dim=0) / 0.2).exp()
        contrast = contrast - (positive / (positive + negative)).log() / len(CLASS_NAMES)
    loss_terms = twins.loss_of(method, s, p, data)
    ce = F.cross_entropy(expected, data.labels_KB[0])
    assert loss_terms["ce"].item() == pytest.approx(ce.item(), rel=1e-4)
    assert loss_terms["contrast"].item() == pytest.approx(0.7 * contrast.item(), rel=1e-4)
    theirs = torch.autograd.grad(ce + 0.7 * contrast, [sigma, u, v])
    for ours, other in zip(twins.gradients(loss_terms, twins.leaves(s, p)), theirs, strict=True):
        twins.close(ours[0], other)


def test_contrast_by_hand(clip: FrozenCLIP) -> None:
    """Where sigma is the un-tuned context and U V = 0, both cosines are 1: log 2."""
    method = twins.build(clip, "fedpgp", mu=1.0, **OPTIONS)
    ids = clip.tokenizer(["X X X"])[0, 1:4]
    sigma = clip.text.token_embedding(ids).detach()[None]
    private = {"U": torch.zeros(1, 3, 2), "V": torch.ones(1, 2, clip.text.width)}
    loss_terms = twins.loss_of(
        method, {"sigma": sigma}, private, twins.one_client(twins.batch(clip), 0)
    )
    assert loss_terms["contrast"].item() == pytest.approx(math.log(2), rel=1e-5)


def test_the_contrast_moves_the_private_term_too(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedpgp", **OPTIONS)
    shared, private = twins.tensors(method)
    loss_terms = twins.loss_of(method, shared, private, twins.batch(clip))
    u = torch.autograd.grad(loss_terms["contrast"].sum(), private["U"])[0]
    assert u.any()


def test_the_untuned_features_are_computed_once_and_are_constant(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedpgp", **OPTIONS)
    first = method.untuned_CD
    assert first is method.untuned_CD
    assert not first.requires_grad
    assert "contrast" not in twins.loss_of(
        twins.build(clip, "fedpgp", mu=0.0, **OPTIONS), *twins.tensors(method), twins.batch(clip)
    )


def test_clients_do_not_touch_each_other(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedpgp", **OPTIONS)
    twins.assert_clients_alone_agree(method, *twins.tensors(method), twins.batch(clip))


def test_global_model_is_sigma_alone(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedpgp", **OPTIONS)
    sigma = twins.tensors(method)[0]["sigma"][:1]
    twins.close(
        method.encode({"sigma": sigma}, None)["classes"][0], twins.class_features(clip, sigma[0])
    )


def test_containers_and_upload(clip: FrozenCLIP) -> None:
    method = twins.build(shape_only_clip("ViT-B-16"), "fedpgp")
    assert uploaded_numbers(method) == 16 * 512
    shapes = {n: tuple(t.shape) for n, t in method.init_private(0, 0).items()}
    assert shapes == {"U": (16, 8), "V": (8, 512)}
    for options in ({"bottleneck": 0}, {"temperature": 0.0}):
        with pytest.raises(UserError):
            twins.build(clip, "fedpgp", **options)


def test_composition_by_attention(clip: FrozenCLIP) -> None:
    """Every token of sigma attends to the rows of U V; the default stays their sum."""
    method = twins.build(clip, "fedpgp", composition="attention", context_tokens=4, bottleneck=2)
    shared, private = twins.tensors(method, 0.2)
    classes = method.encode(shared, private)["classes"]
    for k in range(K):
        own = private["U"][k] @ private["V"][k]
        context = twins.cross_attended(shared["sigma"][k], own)
        twins.close(classes[k], twins.class_features(clip, context))
    with pytest.raises(UserError, match="composition"):
        twins.build(clip, "fedpgp", composition="concat")
