"""IVLP against a plain twin: deep prompts of both towers, learned apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.config.fields import build
from fedprompt.errors import UserError
from fedprompt.methods.base import Method, Task, uploaded_numbers
from fedprompt.methods.registry import method_class
from tests.support import twins
from tests.support.builders import CLASS_NAMES, batch_of, random_clip

K, B = 2, 5
LABELS = torch.tensor([[0, 1, 2, 3, 3], [5, 4, 0, 0, 1]])


@pytest.fixture(scope="module")
def deep_clip() -> FrozenCLIP:
    return random_clip(vision_cfg={"layers": 4}, text_cfg={"layers": 5})


def make(clip: FrozenCLIP, **options: Any) -> Method:
    cls = method_class("ivlp")
    return cls(build(cls.Config, {"name": "ivlp", **options}, "method"), clip, Task(CLASS_NAMES))


@pytest.mark.parametrize(
    ("options", "prefix"),
    [
        ({}, "a photo of a"),
        ({"text_depth": 3, "visual_depth": 1, "text_tokens": 4}, "a photo of a"),
        ({"text_depth": 1, "visual_depth": 2, "visual_tokens": 7}, "a photo of a"),
        ({"text_tokens": 3, "context_init": None}, "X X X"),
    ],
)
def test_logits_loss_and_gradients_are_the_plain_ones(
    deep_clip: FrozenCLIP, options: dict[str, Any], prefix: str
) -> None:
    method = make(deep_clip, **options)
    shared = twins.moved(method.init_shared(1), K, 1)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    batch = batch_of(twins.pictures(deep_clip, K, B), LABELS, mask)
    encoded = method.encode(shared, {})
    logits = method.logits(encoded, batch.inputs)
    loss_terms = method.loss_terms(shared, {}, encoded, batch)
    assert list(loss_terms) == ["ce"]
    ours = torch.autograd.grad(loss_terms["ce"].sum(), [shared["text"], shared["visual"]])
    scale = deep_clip.model.logit_scale.exp()
    for k in range(K):
        leaves = [shared[n].detach()[k].clone().requires_grad_() for n in ("text", "visual")]
        assert batch.inputs.pixels is not None
        images = twins.plain_images(deep_clip, batch.inputs.pixels[k], list(leaves[1]))
        expected = scale * images @ twins.plain_text(deep_clip, prefix, list(leaves[0])).T
        twins.close(logits[k], expected)
        real = int(mask[k].sum())
        loss = F.cross_entropy(expected[:real], LABELS[k, :real])
        assert loss_terms["ce"][k].item() == pytest.approx(loss.item(), rel=1e-4)
        for mine, theirs in zip(ours, torch.autograd.grad(loss, leaves), strict=True):
            twins.close(mine[k], theirs)


def test_starts_are_the_authors(deep_clip: FrozenCLIP) -> None:
    """ "a photo" is learned and "of a" stays; everything else is N(0, 0.02^2)."""
    shared = make(deep_clip, visual_tokens=50).init_shared(1)
    ids = deep_clip.tokenizer(["a photo of a river."])
    assert torch.equal(shared["text"][0], deep_clip.model.token_embedding(ids)[0, 1:3])
    assert shared["text"][1:].std().item() == pytest.approx(0.02, rel=0.2)
    assert shared["visual"].std().item() == pytest.approx(0.02, rel=0.05)
    assert shared["visual"].mean().abs() < 0.001
    assert not torch.equal(shared["visual"][1], shared["visual"][2])


def test_all_prompts_are_uploaded_and_depth_ends_with_the_tower(deep_clip: FrozenCLIP) -> None:
    method = make(deep_clip)
    assert {n: t.shape for n, t in method.init_shared(1).items()} == {
        "text": (5, 2, 64),
        "visual": (4, 2, 64),
    }
    assert method.init_private(1, 0) == {}
    assert uploaded_numbers(method) == 5 * 2 * 64 + 4 * 2 * 64
    assert uploaded_numbers(make(shape_only_clip("ViT-B-16"))) == 30_720


def test_the_towers_do_not_know_each_other(deep_clip: FrozenCLIP) -> None:
    """The gradient of class features reaches text prompts alone, that of images visual ones."""
    method, inputs = make(deep_clip), twins.pictures(deep_clip, K, B)
    shared = twins.moved(method.init_shared(1), K, 1)
    encoded = method.encode(shared, {})
    text, visual = torch.autograd.grad(
        encoded["classes"].square().sum(), [shared["text"], shared["visual"]], allow_unused=True
    )
    assert text is not None
    assert visual is None
    free = encoded | {"classes": encoded["classes"].detach()}
    text, visual = torch.autograd.grad(
        method.logits(free, inputs).square().sum(),
        [shared["text"], shared["visual"]],
        allow_unused=True,
    )
    assert text is None
    assert visual is not None


def test_wrong_settings_are_one_line(deep_clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match="visual_tokens is 0; it must be at least 1"):
        make(deep_clip, visual_tokens=0)
    with pytest.raises(UserError, match="cannot be split after 9 tokens"):
        make(deep_clip, text_tokens=9)
    deep_clip_without = random_clip()
    deep_clip_without.model.visual = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="choose a ViT backbone"):
        make(deep_clip_without)
