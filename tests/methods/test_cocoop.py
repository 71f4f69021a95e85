"""CoCoOp and FedCoCoOp: twin that encodes image by image; many images at a time change nothing."""

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
from fedprompt.methods.base import Tensors, uploaded_numbers
from tests.support.text_twin import (
    B,
    K,
    assert_close,
    build_method,
    class_features,
    gradients,
    images_of,
    moved,
    some_batch,
)


def twin_logits(clip: FrozenCLIP, own: Tensors, images: Tensor) -> Tensor:
    """CoCoOp's forward as torch modules, one image after the other."""
    rows = []
    for image in images:
        hidden = torch.relu(own["linear1.weight"] @ image + own["linear1.bias"])
        shift = own["linear2.weight"] @ hidden + own["linear2.bias"]
        classes = class_features(clip, own["ctx"] + shift)
        rows.append(clip.model.logit_scale.exp() * classes @ image)
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["cocoop", "fedcocoop"])
def test_twin(clip: FrozenCLIP, name: str) -> None:
    method = build_method(clip, name)
    shared, batch = moved(method, scale=0.2), some_batch(clip)
    encoded = method.encode(shared, {})
    logits, loss_terms = (
        method.logits(encoded, batch.inputs),
        method.loss_terms(shared, {}, encoded, batch),
    )
    ours = gradients(method, shared, batch)
    assert ours.keys() == shared.keys()
    for k in range(K):
        own = {n: t[k].detach().requires_grad_() for n, t in shared.items()}
        images, labels = images_of(batch, k)
        expected = twin_logits(clip, own, images)
        assert_close(logits[k][batch.mask_KB[k]], expected, "logits")
        loss = F.cross_entropy(expected, labels)
        assert_close(loss_terms["ce"][k], loss, "loss")
        for n, theirs in zip(own, torch.autograd.grad(loss, list(own.values())), strict=True):
            assert_close(ours[n][k], theirs, n)


def test_a_bounded_number_of_images_at_once_changes_nothing(clip: FrozenCLIP) -> None:
    """3 of 10 prompts at a time, in training (computed again for the gradient) and without."""
    method: Any = build_method(clip, "cocoop")
    shared, batch = moved(method, scale=0.2), some_batch(clip)
    whole, whole_logits = gradients(method, shared, batch), method.logits(shared, batch.inputs)
    assert method.prompts_at_once >= K * B
    method.prompts_at_once = 3
    for n, gradient in gradients(method, shared, batch).items():
        assert_close(gradient, whole[n], n)
    with torch.no_grad():
        assert_close(method.logits(shared, batch.inputs), whole_logits)


def test_memory_of_the_tower_is_bounded(clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of the tower sees more prompts than `prompts_at_once`."""
    method: Any = build_method(clip, "cocoop")
    method.prompts_at_once = 4
    seen, classes = [], method.prompts.classes
    monkeypatch.setattr(
        method.prompts, "classes", lambda context: seen.append(len(context)) or classes(context)
    )
    gradients(method, moved(method), some_batch(clip))
    assert seen
    assert max(seen) == 4


def test_an_image_moves_its_own_prompt_only(clip: FrozenCLIP) -> None:
    method = build_method(clip, "cocoop")
    shared = moved(method, scale=0.2)
    features = some_batch(clip).inputs.features
    other = features.clone()
    other[:, 0] = features[:, 1]
    before = method.logits(shared, Inputs(features))
    after = method.logits(shared, Inputs(other))
    assert_close(after[:, 1:], before[:, 1:])
    assert (after[:, 0] - before[:, 0]).abs().max() > 1e-2


def test_one_shared_model_serves_many_clients_images(clip: FrozenCLIP) -> None:
    """Client axis 1 in evaluation, K image sets."""
    method, batch = build_method(clip, "cocoop"), some_batch(clip)
    shared = {n: t[None] for n, t in method.init_shared(1).items()}
    together = method.logits(method.encode(shared, None), batch.inputs)
    assert together.shape == (K, B, 6)
    for k in range(K):
        alone = method.logits(shared, batch.inputs[k : k + 1])
        assert_close(together[k], alone[0])


def test_upload_on_vit_b16() -> None:
    """4 x 512 tokens, 512 x 32 + 32 and 32 x 512 + 512 of the Meta-Net."""
    method = build_method(shape_only_clip("ViT-B-16"), "cocoop")
    assert uploaded_numbers(method) == 35_360


def test_starts(clip: FrozenCLIP) -> None:
    words, random = build_method(clip, "cocoop"), build_method(clip, "fedcocoop")
    assert torch.equal(words.init_shared(1)["ctx"], words.init_shared(2)["ctx"])
    assert not torch.equal(random.init_shared(1)["ctx"], random.init_shared(2)["ctx"])
    assert dict(random.strategy) == {"name": "fedavg", "weights": "uniform"}
    with pytest.raises(UserError, match="bottleneck"):
        build_method(clip, "cocoop", bottleneck=0)
