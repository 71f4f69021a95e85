"""GRAM: twin of the first-order meta-gradient; what a client returns; how a batch is divided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import ClientData, uploaded_numbers
from fedprompt.methods.gram import episode
from tests.support import twins
from tests.support.twins import K

NAMES = ("ctx", "regulator.scale.ctx", "regulator.shift.ctx")
OPTIONS: dict[str, Any] = {"options": {"context_tokens": 4}, "inner_lr": 0.05}


def ce(clip: FrozenCLIP, context: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """CoOp's cross-entropy."""
    return F.cross_entropy(
        clip.logit_scale * images @ twins.class_features(clip, context).T, labels
    )


def twin(
    clip: FrozenCLIP, own: list[Tensor], images: Tensor, labels: Tensor, alpha: float
) -> tuple[Tensor, list[Tensor]]:
    """The query loss, and the first-order gradients of theta, a and b, written out."""
    theta, a, b = (t.detach() for t in own)
    half = len(images) // 2
    leaf = theta.clone().requires_grad_()
    (x,) = torch.autograd.grad(ce(clip, leaf, images[:half], labels[:half]), [leaf])
    after = (theta - alpha * (a * x + b)).requires_grad_()
    query = ce(clip, after, images[half:], labels[half:])
    (g,) = torch.autograd.grad(query, [after])
    return query, [g, -alpha * g * x, -alpha * g]


def test_twin(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "gram", **OPTIONS)
    shared, batch = twins.tensors(method)[0], twins.batch(clip)
    terms = twins.loss_of(method, shared, {}, batch)
    assert list(terms) == ["ce"]
    ours = twins.applied_gradients(method, shared, batch)
    for k in range(K):
        own = [shared[n][k] for n in NAMES]
        query, theirs = twin(clip, own, *twins.images_of(batch, k), alpha=0.05)
        twins.close(terms["ce"][k], query, "query loss")
        for n, gradient in zip(NAMES, theirs, strict=True):
            twins.close(ours[n][k], gradient, n)


def test_a_client_returns_its_meta_gradient(clip: FrozenCLIP) -> None:
    """After one step of plain SGD, the change divided by the rate is the meta-gradient."""
    method = twins.build(clip, "gram", **OPTIONS)
    batch, start = twins.batch(clip), method.init_shared(1)
    images, labels = twins.images_of(batch, 0)
    training = twins.config(lr=100.0, local_epochs=1, batch_size=8, momentum=0.0, weight_decay=0.0)
    data = ClientData(0, Inputs(images), labels)
    (result,) = twins.train(method, [start], [{}], [data], training, 1)
    order = twins.batches(data, training, 1)[0]
    _, theirs = twin(clip, [start[n] for n in NAMES], images[order], labels[order], alpha=0.05)
    for n, gradient in zip(NAMES, theirs, strict=True):
        change = (start[n] - torch.as_tensor(result.shared[n])) / 100
        twins.close(change, gradient, n)


@pytest.mark.parametrize("base", ["kgcoop", "fedrsclip"])
def test_any_base_and_clients_do_not_touch_each_other(clip: FrozenCLIP, base: str) -> None:
    method = twins.build(clip, "gram", base=base)
    twins.assert_clients_alone_agree(method, *twins.tensors(method), twins.batch(clip))


def test_halves_of_a_batch() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    support, query = episode(mask)
    assert support.sum(-1).tolist() == [2, 1, 1, 1]
    assert query.sum(-1).tolist() == [3, 2, 1, 1]
    assert torch.equal(support[:3] ^ query[:3], mask[:3])


def test_upload_on_vit_b16() -> None:
    """Three times PromptFL's 8,192."""
    assert uploaded_numbers(twins.build(shape_only_clip("ViT-B-16"), "gram")) == 3 * 8_192


@pytest.mark.parametrize(
    ("options", "named"), [({"inner_lr": 0}, "inner_lr"), ({"base": "palm"}, "per_class")]
)
def test_bad_options(clip: FrozenCLIP, options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        twins.build(clip, "gram", **options)
