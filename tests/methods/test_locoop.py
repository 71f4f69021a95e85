"""LoCoOp: twin of the regions' entropy, region by region; which regions count; what it needs."""

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
from fedprompt.methods.base import Task, uploaded_numbers
from tests.support import twins
from tests.support.builders import batch_of
from tests.support.twins import K


def twin_entropy(scale: float, classes: Tensor, images: Tensor, labels: Tensor, k: int) -> Tensor:
    """The mean entropy of the regions whose `k` best classes lack the image's label, by loops."""
    found = []
    for regions, label in zip(images, labels, strict=True):
        for region in regions:
            p = torch.stack([scale * (region @ t) for t in classes]).softmax(0)
            if int(label) not in p.topk(k).indices.tolist():
                found.append(-sum(q * (q + 1e-5).log() for q in p))
    return torch.stack(found).mean()


@pytest.mark.parametrize(("share", "k"), [(0.2, 2), (0.5, 3)])
def test_twin(clip: FrozenCLIP, share: float, k: int) -> None:
    method = twins.build(clip, "locoop", context_tokens=4, top_share=share)
    shared, batch = twins.tensors(method)[0], twins.batch(clip, local=True)
    loss_terms = twins.loss_of(method, shared, {}, batch)
    ours = twins.applied_gradients(method, shared, batch)["ctx"]
    assert list(loss_terms) == ["ce", "ood"]
    for client in range(K):
        context = shared["ctx"][client].detach().requires_grad_()
        classes = twins.class_features(clip, context)
        images, labels = twins.images_of(batch, client)
        ce = F.cross_entropy(clip.logit_scale * images @ classes.T, labels)
        local = batch.inputs.local[client][batch.mask_KB[client]]
        entropy = twin_entropy(clip.logit_scale, classes, local, labels, k)
        twins.close(loss_terms["ce"][client], ce, "ce")
        twins.close(loss_terms["ood"][client], -0.25 * entropy, "ood")
        (theirs,) = torch.autograd.grad(ce - 0.25 * entropy, [context])
        twins.close(ours[client], theirs, "gradient")


def test_clients_do_not_touch_each_other(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "locoop", context_tokens=4)
    twins.assert_clients_alone_agree(method, *twins.tensors(method), twins.batch(clip, local=True))


def test_without_a_region_the_term_is_zero(clip: FrozenCLIP) -> None:
    """Regions that look like their own class show the label."""
    method = twins.build(clip, "locoop", context_tokens=4)
    shared = {n: t[None] for n, t in method.init_shared(1).items()}
    classes = method.encode(shared, None)["classes"]
    inputs = Inputs(classes, local=classes[:, :, None].expand(-1, -1, 3, -1))
    terms = twins.loss_of(method, shared, {}, batch_of(inputs, torch.arange(6)[None]))
    assert terms["ood"].tolist() == [0.0]


@pytest.mark.parametrize(("classes", "k"), [(1, 0), (2, 1), (5, 1), (10, 2), (21, 5), (45, 9)])
def test_k_is_relative_to_the_number_of_classes(clip: FrozenCLIP, classes: int, k: int) -> None:
    names = tuple(f"class {'abcdefghij'[i % 10]} {i}" for i in range(classes))
    method: Any = twins.build(clip, "locoop", Task(names))
    assert method.top_k == k


def test_local_features_are_read_in_training_only(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "locoop")
    assert (method.needs, method.needs_to_train) == ({"features"}, {"local"})
    wrapped = twins.build(clip, "fedprox", base="locoop")
    assert wrapped.needs_to_train == {"local"}


def test_upload_on_vit_b16() -> None:
    assert uploaded_numbers(twins.build(shape_only_clip("ViT-B-16"), "locoop")) == 8_192


@pytest.mark.parametrize("options", [{"top_share": 1.0}, {"top_share": 0}, {"ood_weight": -1}])
def test_bad_options(clip: FrozenCLIP, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        twins.build(clip, "locoop", **options)
