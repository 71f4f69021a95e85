"""FedOTP against an independent twin: plain text pass, one image and class at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.methods.base import uploaded_numbers
from tests.methods.test_plot import twin_logits
from tests.support import twins
from tests.support.twins import K

OPTIONS: list[dict[str, Any]] = [
    {},
    {"eps": 0.01},
    {"transport": "balanced", "threshold": 1e-2},
    {"gamma": 1.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_loss_and_gradients_are_the_twins(clip: FrozenCLIP, options: dict[str, Any]) -> None:
    method = twins.build(clip, "fedotp", context_tokens=2, **options)
    shared, private = twins.tensors(method)
    k, data = 1, twins.one_client(twins.batch(clip, patches=True), 1)
    s, p = twins.row(shared, k), twins.row(private, k)
    pair = [t["ctx"].detach()[k].clone().requires_grad_() for t in (shared, private)]
    expected = twin_logits(
        clip,
        pair,
        data.inputs.patches[0],
        eps=options.get("eps", 0.1),
        threshold=options.get("threshold", 1e-3),
        gamma=None if "transport" in options else options.get("gamma", 0.8),
    )
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


def test_global_model_is_the_shared_prompt_under_the_same_transport(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedotp", context_tokens=2)
    shared = twins.row(twins.tensors(method)[0], 0)
    data = twins.one_client(twins.batch(clip, patches=True), 0)
    expected = twin_logits(
        clip, [shared["ctx"][0]], data.inputs.patches[0], threshold=1e-3, gamma=0.8
    )
    twins.close(method.logits(method.encode(shared, None), data.inputs)[0], expected)


def test_clients_and_padding_do_not_touch_each_other(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedotp", context_tokens=2)
    twins.assert_clients_alone_agree(
        method, *twins.tensors(method), twins.batch(clip, patches=True)
    )


def test_one_shared_prompt_serves_all_clients_in_evaluation(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedotp", context_tokens=2)
    shared, private = twins.tensors(method)
    once = {"ctx": shared["ctx"][:1]}
    each = {"ctx": shared["ctx"][:1].expand(K, -1, -1)}
    twins.close(
        method.encode(once, private)["prompts"], method.encode(each, private)["prompts"], rtol=1e-6
    )


def test_containers_and_upload() -> None:
    method = twins.build(shape_only_clip("ViT-B-16"), "fedotp", context_tokens=4)
    assert uploaded_numbers(method) == 4 * 512 == 2048
    shared, private = method.init_shared(0)["ctx"], method.init_private(0, 0)["ctx"]
    assert shared.shape == private.shape == (4, 512)
    assert not torch.equal(shared, private)
    assert torch.equal(private, method.init_private(0, 7)["ctx"])


@pytest.mark.parametrize(
    "options", [{"gamma": 1.2}, {"gamma": 0.0}, {"transport": "cot"}, {"max_iterations": 0}]
)
def test_meaningless_choices_are_refused(clip: FrozenCLIP, options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        twins.build(clip, "fedotp", **options)
