"""FedMVP: a twin of torch's own attention, image by image; sentences; upload; refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, Task, Tensors, uploaded_numbers
from tests.support import twins
from tests.support.builders import CLASS_NAMES, batch_of, random_resnet_clip
from tests.support.twins import B, K

TASK = Task(
    CLASS_NAMES,
    descriptions=(
        (CLASS_NAMES[0].replace("_", " "), ("a ribbon of water.", "green banks.", "two boats.")),
        (CLASS_NAMES[1].replace("_", " "), ("rows of trees.",)),
    ),
)
"""Classes with three sentences, with one, and with the template."""
WITHOUT_EFFECT = "norm_k.bias"
"""It adds the same to the products of a query with all keys; its gradient is rounding."""


def pictures(clip: FrozenCLIP) -> Batch:
    inputs = twins.pictures(clip, K, B)
    mask = torch.arange(B)[None] < torch.tensor(twins.REAL)[:, None]
    batch = batch_of(inputs, torch.tensor(twins.LABELS), mask)
    return replace(batch, second_KBD=inputs.features.roll(1, -1))


def plain_prompts(clip: FrozenCLIP, own: Tensors, texts_TD: Tensor, pixels: Tensor) -> Tensor:
    """The prompts (M, w) of one picture, by torch.nn.MultiheadAttention."""
    visual: Any = clip.model.visual
    patches = visual.conv1(pixels[None]).flatten(2).transpose(1, 2)[0]
    patches = patches + visual.positional_embedding[1:]
    width = patches.shape[-1]

    def normed(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), own[f"{name}.weight"], own[f"{name}.bias"])

    text = F.linear(texts_TD, own["text.weight"], own["text.bias"])
    attention = nn.MultiheadAttention(width, 4, batch_first=True)
    names = {"in_proj_weight": "qkv.weight", "in_proj_bias": "qkv.bias"}
    names |= {"out_proj.weight": "out.weight", "out_proj.bias": "out.bias"}
    x = torch.func.functional_call(
        attention,
        {theirs: own[ours] for theirs, ours in names.items()},
        (normed(patches, "norm_q")[None], normed(text, "norm_k")[None], text[None]),
        {"need_weights": False},
    )[0][0]
    hidden = F.linear(normed(x, "norm_ff"), own["up.weight"], own["up.bias"])
    kept, gate = hidden.chunk(2, -1)
    x = x + F.linear(kept * F.gelu(gate), own["down.weight"], own["down.bias"])
    return torch.stack([part.mean(0) for part in x.chunk(4)])


def test_twin(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedmvp", TASK)
    shared, batch = twins.tensors(method, 0.02)[0], pictures(clip)
    terms = twins.loss_of(method, shared, {}, batch)
    ours = twins.applied_gradients(method, shared, batch)
    sentences = TASK.sentences()
    with torch.no_grad():
        texts = [
            F.normalize(clip.model.encode_text(clip.tokenizer(list(own))), dim=-1)
            for own in sentences
        ]
    for k in range(K):
        own = {n: t[k].detach().requires_grad_() for n, t in shared.items()}
        real, losses, distances = batch.mask_KB[k], [], []
        for pixels, second, label in zip(
            batch.inputs.pixels[k][real], batch.second_KBD[k][real],
            batch.labels_KB[k][real], strict=True,
        ):  # fmt: skip
            prompts = plain_prompts(clip, own, torch.cat(texts), pixels)
            image = twins.plain_images(clip, pixels[None], [prompts])[0]
            logits = [clip.logit_scale * (class_texts @ image).mean() for class_texts in texts]
            losses.append(F.cross_entropy(torch.stack(logits), label))
            distances.append(1 - image @ second)
        expected = {
            "ce": torch.stack(losses).mean(),
            "consistency": 10 * torch.stack(distances).mean(),
        }
        assert terms.keys() == expected.keys()
        for name, value in expected.items():
            twins.close(terms[name][k], value, name)
        found = torch.autograd.grad(sum(expected.values()), list(own.values()))
        for n, theirs in zip(own, found, strict=True):
            if n == WITHOUT_EFFECT:
                assert float(ours[n][k].abs().max()) < 1e-6
            else:
                twins.close(ours[n][k], theirs, n)


def test_clients_do_not_touch_each_other(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedmvp")
    shared = twins.tensors(method)[0]
    shared[WITHOUT_EFFECT] = shared[WITHOUT_EFFECT].detach()
    twins.assert_clients_alone_agree(method, shared, {}, pictures(clip))


def test_upload_on_vit_b16() -> None:
    """A projection of text, the attention, its feed-forward network of 4 x 768, and norms."""
    w = 768
    expected = (512 * w + w) + 4 * (w * w + w) + (8 * w * w + 8 * w) + (4 * w * w + w) + 6 * w
    method = twins.build(shape_only_clip("ViT-B-16"), "fedmvp")
    assert uploaded_numbers(method) == expected == 9_845_760


def test_refusals(clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match="'heads' \\(5\\)"):
        twins.build(clip, "fedmvp", heads=5)
    with pytest.raises(UserError, match="visual_tokens"):
        twins.build(clip, "fedmvp", visual_tokens=10_000)
    with pytest.raises(UserError, match="ViT"):
        twins.build(random_resnet_clip(), "fedmvp")
