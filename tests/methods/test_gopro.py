"""GOPro: a twin with torch's own layers and loops, private networks, upload, refusal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, Tensors, uploaded_numbers
from tests.support import twins
from tests.support.builders import random_resnet_clip
from tests.support.twins import K

WITHOUT_EFFECT = {"g.bias", "mix.bias"}
"""A norm follows that takes them out again: the batch norm, and the text tower's layer norms."""


def two_views(clip: FrozenCLIP) -> Batch:
    batch = twins.batch(clip, statistics=True)
    return replace(
        batch,
        second_KBD=batch.inputs.features.roll(1, -1),
        second_statistics=twins.style_statistics(clip, *batch.labels_KB.shape, seed=5),
    )


def plain_classes(clip: FrozenCLIP, own: Tensors, statistics_L2w: Tensor) -> Tensor:
    """Class features (C, D) of one image, layer by layer."""
    shift = own["mix.bias"]
    for layer, (mean, deviation) in enumerate(statistics_L2w):
        style, content = (
            F.linear(x, own[f"{n}.weight"][layer], own[f"{n}.bias"][layer])
            for n, x in (("style", (mean + deviation) / 2), ("content", mean))
        )
        shift = shift + own["mix.weight"][0, layer] * (style + content) / 2
    return twins.class_features(clip, own["ctx"] + shift)


def plain_contrast(own: Tensors, one: Tensor, other: Tensor) -> Tensor:
    """SimCLR's loss, anchor by anchor."""
    views = torch.cat(
        [
            F.normalize(
                F.batch_norm(
                    F.linear(x, own["g.weight"], own["g.bias"]),
                    None, None, own["g_norm.weight"], own["g_norm.bias"], training=True,
                ),
                dim=-1,
            )
            for x in (one, other)
        ]
    )  # fmt: skip
    losses, count = [], len(views)
    for i in range(count):
        cosines = {j: views[i] @ views[j] / 0.1 for j in range(count) if j != i}
        positive = cosines[(i + count // 2) % count]
        losses.append(torch.stack(list(cosines.values())).logsumexp(0) - positive)
    return torch.stack(losses).mean()


def test_twin(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "gopro", context_tokens=2, context_init=None)
    shared, batch = twins.tensors(method, 0.02)[0], two_views(clip)
    terms = twins.loss_of(method, shared, {}, batch)
    ours = twins.applied_gradients(method, shared, batch)
    assert ours.keys() == shared.keys()
    for k in range(K):
        own = {n: t[k].detach().requires_grad_() for n, t in shared.items()}
        real = batch.mask_KB[k]
        images, labels = twins.images_of(batch, k)
        first, second = (
            torch.stack([plain_classes(clip, own, one) for one in statistics[k][real]])
            for statistics in (batch.inputs.statistics, batch.second_statistics)
        )
        logits = clip.logit_scale * (first @ images[:, :, None])[..., 0]
        expected = {
            "ce": F.cross_entropy(logits, labels),
            "semantic": 2 * F.mse_loss(first, second),
            "contrast": 0.1 * plain_contrast(own, images, batch.second_KBD[k][real]),
        }
        assert terms.keys() == expected.keys()
        for name, value in expected.items():
            twins.close(terms[name][k], value, name)
        found = torch.autograd.grad(sum(expected.values()), list(own.values()))
        for n, theirs in zip(own, found, strict=True):
            # Only rounding is left of what a norm takes out again.
            if n in WITHOUT_EFFECT:
                assert float(ours[n][k].abs().max()) < 1e-5
            else:
                twins.close(ours[n][k], theirs, n)


@pytest.mark.parametrize("projectors", ["shared", "private"])
def test_clients_do_not_touch_each_other(clip: FrozenCLIP, projectors: str) -> None:
    method = twins.build(clip, "gopro", projectors=projectors)
    shared, private = twins.tensors(method)
    held = private or shared
    held |= {n: held[n].detach() for n in WITHOUT_EFFECT}
    twins.assert_clients_alone_agree(method, shared, private, two_views(clip))


def test_a_single_image_has_no_contrast_and_finite_gradients(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "gopro")
    shared = twins.tensors(method)[0]
    batch = two_views(clip)
    mask = torch.zeros_like(batch.mask_KB)
    mask[:, 0] = True
    batch = replace(batch, mask_KB=mask)
    assert not twins.loss_of(method, shared, {}, batch)["contrast"].any()
    gradients = twins.applied_gradients(method, shared, batch).values()
    assert all(g.isfinite().all() for g in gradients)


def test_private_networks_leave_a_global_model_without_shift(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "gopro", projectors="private")
    shared, private = twins.tensors(method)
    assert set(shared) == {"ctx"}
    inputs = twins.batch(clip, statistics=True).inputs
    plain = method.logits(method.encode(shared, None), inputs)
    for k in range(K):
        classes = twins.class_features(clip, shared["ctx"][k])
        twins.close(plain[k], clip.logit_scale * inputs.features[k] @ classes.T)
    own = method.logits(method.encode(shared, private), inputs)
    assert float((own - plain).detach().abs().max()) > 0.1


def test_upload_on_vit_b16() -> None:
    """Two times 12 projections, 12 + 1, the contrast's 512 x 512 + 3 x 512, and 4 x 512 tokens."""
    clip = shape_only_clip("ViT-B-16")
    projections = 2 * 12 * (768 * 512 + 512)
    expected = projections + 13 + 512 * 512 + 3 * 512 + 4 * 512
    assert uploaded_numbers(twins.build(clip, "gopro")) == expected == 9_715_213
    assert uploaded_numbers(twins.build(clip, "gopro", projectors="private")) == 2_048


def test_a_resnet_is_refused() -> None:
    with pytest.raises(UserError, match=r"backbone.*ViT"):
        twins.build(random_resnet_clip(), "gopro")
