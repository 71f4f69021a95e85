"""DualPrompt for remote sensing against a plain twin, its starts and its upload."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.methods.base import uploaded_numbers
from tests.support import twins
from tests.support.builders import batch_of, random_clip

K, B = 2, 5


@pytest.fixture(scope="module")
def deep_clip() -> FrozenCLIP:
    return random_clip(vision_cfg={"layers": 5}, text_cfg={"layers": 4})


def twin(
    clip: FrozenCLIP, leaves: dict[str, Tensor], pixels: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, C), image features and class features of one client, layer by layer."""
    depth = len(leaves["text"]) + len(leaves.get("visual", ()))
    text, visual = [], []
    texts, pictures = iter(range(depth)), iter(range(depth))
    for layer in range(depth):
        if layer == 0 or layer % 2 == 1:
            i, name, learned, other = next(texts), "to_visual", text, visual
            prompt = leaves["text"][i]
        else:
            i, name, learned, other = next(pictures), "to_text", visual, text
            prompt = leaves["visual"][i]
        learned.append(prompt)
        other.append(F.linear(prompt, leaves[f"{name}.weight"][i], leaves[f"{name}.bias"][i]))
    images = twins.plain_images(clip, pixels, visual)
    classes = twins.plain_text(clip, "a photo of a", text)
    return scale * images @ classes.T, images, classes


@pytest.mark.parametrize(
    ("options", "scale", "weight"),
    [
        ({"depth": 4}, 1 / 0.07, 0.5),
        ({"depth": 3, "alignment": 0.0}, 1 / 0.07, 0.0),
        ({"depth": 2, "alignment": 2.0, "logit_scale": 7.0}, 7.0, 2.0),
        ({"depth": 1}, 1 / 0.07, 0.5),
        ({"depth": 9, "logit_scale": None}, None, 0.5),  # the text tower has four layers
    ],
)
def test_logits_loss_and_gradients_are_the_plain_ones(
    deep_clip: FrozenCLIP, options: dict[str, Any], scale: float | None, weight: float
) -> None:
    method = twins.build(deep_clip, "dualprompt_rs", **options)
    shared = twins.moved(method.init_shared(1), K, 1)
    batch = batch_of(
        twins.pictures(deep_clip, K, B), torch.tensor([[0, 1, 2, 3, 3], [5, 4, 0, 0, 1]])
    )
    batch = replace(batch, mask_KB=torch.tensor([[True] * 5, [True] * 3 + [False] * 2]))
    encoded = method.encode(shared, {})
    logits = method.logits(encoded, batch.inputs)
    terms = method.loss_terms(shared, {}, encoded, batch)
    assert ("alignment" in terms) == (weight > 0)
    ours = torch.autograd.grad([t.sum() for t in terms.values()], list(shared.values()))
    for k in range(K):
        leaves = {n: t.detach()[k].clone().requires_grad_() for n, t in shared.items()}
        assert batch.inputs.pixels is not None
        factor = deep_clip.logit_scale if scale is None else scale
        expected, images, classes = twin(deep_clip, leaves, batch.inputs.pixels[k], factor)
        twins.close(logits[k], expected)
        real = int(batch.mask_KB[k].sum())
        labels = batch.labels_KB[k, :real]
        cosines = F.cosine_similarity(images[:real], classes[labels])
        loss = F.cross_entropy(expected[:real], labels) + weight * (1 - cosines.mean())
        assert sum(t[k].item() for t in terms.values()) == pytest.approx(loss.item(), rel=1e-4)
        for mine, theirs in zip(ours, torch.autograd.grad(loss, [*leaves.values()]), strict=True):
            twins.close(mine[k], theirs)


def test_starts_are_words_normal_draws_and_linear_layers_of_their_own(
    deep_clip: FrozenCLIP,
) -> None:
    method = twins.build(deep_clip, "dualprompt_rs", depth=4)
    start = method.init_shared(1)
    ids = deep_clip.tokenizer(["a photo of a river."])
    assert torch.equal(start["text"][0], deep_clip.model.token_embedding(ids)[0, 1:3])
    for deep in (start["text"][1:], start["visual"]):
        assert deep.std().item() == pytest.approx(0.02, rel=0.2)
    for name, inputs in (("to_visual", deep_clip.text.width), ("to_text", method.vision.width)):
        weight = start[f"{name}.weight"]
        assert 0.9 * inputs**-0.5 < weight.abs().max() <= inputs**-0.5
    assert not torch.equal(start["to_visual.weight"][1], start["to_visual.weight"][2])


def test_upload_on_vit_b16() -> None:
    method = twins.build(shape_only_clip("ViT-B-16"), "dualprompt_rs")
    prompts = 2 * (5 * 512 + 4 * 768)
    assert uploaded_numbers(method) == prompts + 5 * (512 + 1) * 768 + 4 * (768 + 1) * 512
    assert uploaded_numbers(method) == 3_556_096
