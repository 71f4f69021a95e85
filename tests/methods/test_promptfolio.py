"""PromptFolio against an independent twin."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.methods.base import uploaded_numbers
from tests.support import twins
from tests.support.twins import K


@pytest.mark.parametrize("theta", [0.4, 0.9])
@pytest.mark.parametrize("k", range(K))
def test_logits_loss_and_gradients_are_the_twins(clip: FrozenCLIP, theta: float, k: int) -> None:
    method = twins.build(clip, "promptfolio", context_tokens=3, theta=theta)
    shared, private = twins.tensors(method)
    data = twins.one_client(twins.batch(clip), k)
    s, p = twins.row(shared, k), twins.row(private, k)
    pair = [t["ctx"].detach()[k].clone().requires_grad_() for t in (shared, private)]
    mixed = (1 - theta) * twins.class_features(clip, pair[0]) + theta * twins.class_features(
        clip, pair[1]
    )
    expected = clip.logit_scale * data.inputs.features[0] @ mixed.T
    twins.close(method.logits(method.encode(s, p), data.inputs)[0], expected)
    loss = F.cross_entropy(expected, data.labels_KB[0])
    loss_terms = twins.loss_of(method, s, p, data)
    assert loss_terms["ce"].item() == pytest.approx(loss.item(), rel=1e-4)
    for ours, theirs in zip(
        twins.gradients(loss_terms, twins.leaves(s, p)),
        torch.autograd.grad(loss, pair),
        strict=True,
    ):
        twins.close(ours[0], theirs)


def test_the_mix_is_not_normalised_again(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "promptfolio", context_tokens=3, theta=0.5)
    norms = method.encode(*twins.tensors(method, noise=1.0))["classes"].detach().norm(dim=-1)
    assert float(norms.min()) < 0.99


def test_clients_do_not_touch_each_other(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "promptfolio", context_tokens=3)
    twins.assert_clients_alone_agree(method, *twins.tensors(method), twins.batch(clip))


def test_global_model_and_a_client_axis_of_one(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "promptfolio", context_tokens=3)
    shared, private = twins.tensors(method)
    once, each = shared["ctx"][:1], shared["ctx"][:1].expand(K, -1, -1)
    twins.close(
        method.encode({"ctx": once}, None)["classes"][0], twins.class_features(clip, once[0])
    )
    ours = method.encode({"ctx": once}, private)["classes"]
    twins.close(ours, method.encode({"ctx": each}, private)["classes"], rtol=1e-6)


def test_containers_and_upload(clip: FrozenCLIP) -> None:
    method = twins.build(shape_only_clip("ViT-B-16"), "promptfolio")
    assert uploaded_numbers(method) == 8 * 512
    assert not torch.equal(method.init_shared(0)["ctx"], method.init_private(0, 0)["ctx"])
    with pytest.raises(UserError):
        twins.build(clip, "promptfolio", theta=1.1)
