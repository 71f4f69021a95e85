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
from tests.support import twins
from tests.support.twins import B, K


def twin_logits(clip: FrozenCLIP, own: Tensors, images: Tensor) -> Tensor:
    """CoCoOp's forward as torch modules, one image after the other."""
    rows = []
    for image in images:
        hidden = torch.relu(own["linear1.weight"] @ image + own["linear1.bias"])
        shift = own["linear2.weight"] @ hidden + own["linear2.bias"]
        classes = twins.class_features(clip, own["ctx"] + shift)
        rows.append(clip.model.logit_scale.exp() * classes @ image)
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["cocoop", "fedcocoop"])
def test_twin(clip: FrozenCLIP, name: str) -> None:
    method = twins.build(clip, name)
    shared, batch = twins.tensors(method, 0.2)[0], twins.batch(clip)
    encoded = method.encode(shared, {})
    logits, loss_terms = (
        method.logits(encoded, batch.inputs),
        method.loss_terms(shared, {}, encoded, batch),
    )
    ours = twins.applied_gradients(method, shared, batch)
    assert ours.keys() == shared.keys()
    for k in range(K):
        own = {n: t[k].detach().requires_grad_() for n, t in shared.items()}
        images, labels = twins.images_of(batch, k)
        expected = twin_logits(clip, own, images)
        twins.close(logits[k][batch.mask_KB[k]], expected, "logits")
        loss = F.cross_entropy(expected, labels)
        twins.close(loss_terms["ce"][k], loss, "loss")
        for n, theirs in zip(own, torch.autograd.grad(loss, list(own.values())), strict=True):
            twins.close(ours[n][k], theirs, n)


def test_a_bounded_number_of_images_at_once_changes_nothing(clip: FrozenCLIP) -> None:
    """3 of 10 prompts at a time, in training (computed again for the gradient) and without."""
    method: Any = twins.build(clip, "cocoop")
    shared, batch = twins.tensors(method, 0.2)[0], twins.batch(clip)
    whole, whole_logits = (
        twins.applied_gradients(method, shared, batch),
        method.logits(shared, batch.inputs),
    )
    assert method.prompts.prompts_at_once >= K * B
    method.prompts.prompts_at_once = 3
    for n, gradient in twins.applied_gradients(method, shared, batch).items():
        twins.close(gradient, whole[n], n)
    with torch.no_grad():
        twins.close(method.logits(shared, batch.inputs), whole_logits)


def test_memory_of_the_tower_is_bounded(clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of the tower sees more prompts than `prompts_at_once`."""
    method: Any = twins.build(clip, "cocoop")
    method.prompts.prompts_at_once = 4
    seen, classes = [], method.prompts.classes
    monkeypatch.setattr(
        method.prompts, "classes", lambda context: seen.append(len(context)) or classes(context)
    )
    twins.applied_gradients(method, twins.tensors(method)[0], twins.batch(clip))
    assert seen
    assert max(seen) == 4


def test_an_image_moves_its_own_prompt_only(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "cocoop")
    shared = twins.tensors(method, 0.2)[0]
    features = twins.batch(clip).inputs.features
    other = features.clone()
    other[:, 0] = features[:, 1]
    before = method.logits(shared, Inputs(features))
    after = method.logits(shared, Inputs(other))
    twins.close(after[:, 1:], before[:, 1:])
    assert (after[:, 0] - before[:, 0]).abs().max() > 1e-2


def test_one_shared_model_serves_many_clients_images(clip: FrozenCLIP) -> None:
    """Client axis 1 in evaluation, K image sets."""
    method, batch = twins.build(clip, "cocoop"), twins.batch(clip)
    shared = {n: t[None] for n, t in method.init_shared(1).items()}
    together = method.logits(method.encode(shared, None), batch.inputs)
    assert together.shape == (K, B, 6)
    for k in range(K):
        alone = method.logits(shared, batch.inputs[k : k + 1])
        twins.close(together[k], alone[0])


def test_upload_on_vit_b16() -> None:
    """4 x 512 tokens, 512 x 32 + 32 and 32 x 512 + 512 of the Meta-Net."""
    method = twins.build(shape_only_clip("ViT-B-16"), "cocoop")
    assert uploaded_numbers(method) == 35_360


def test_starts(clip: FrozenCLIP) -> None:
    words, random = twins.build(clip, "cocoop"), twins.build(clip, "fedcocoop")
    assert torch.equal(words.init_shared(1)["ctx"], words.init_shared(2)["ctx"])
    assert not torch.equal(random.init_shared(1)["ctx"], random.init_shared(2)["ctx"])
    assert dict(random.config.default_strategy) == {"name": "fedavg", "weights": "uniform"}
    with pytest.raises(UserError, match="bottleneck"):
        twins.build(clip, "cocoop", bottleneck=0)
