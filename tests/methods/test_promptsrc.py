"""PromptSRC against a plain twin: logits, all terms, gradients; its templates and its traps."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import build
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, Method, Task
from fedprompt.methods.promptsrc import imagenet_templates, template_mean
from fedprompt.methods.registry import method_class
from tests.support import twins
from tests.support.builders import CLASS_NAMES, batch_of, random_clip

K, B = 2, 5
TERMS = ("ce", "text", "image", "logits")


@pytest.fixture(scope="module")
def deep_clip() -> FrozenCLIP:
    return random_clip(vision_cfg={"layers": 4}, text_cfg={"layers": 5})


def make(clip: FrozenCLIP, classes: tuple[str, ...] = CLASS_NAMES, **options: Any) -> Method:
    cls = method_class("promptsrc")
    config = build(cls.Config, {"name": "promptsrc", **options}, "method")
    return cls(config, clip, Task(classes))


def some_batch(clip: FrozenCLIP) -> Batch:
    labels = torch.tensor([[0, 1, 2, 3, 3], [5, 4, 0, 0, 1]])
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return batch_of(twins.pictures(clip, K, B), labels, mask)


@cache
def frozen_classes(clip: FrozenCLIP) -> Tensor:
    """The mean over templates of un-normalised features, then normalised: one text at a time."""
    rows = []
    for name in CLASS_NAMES:
        texts = [template.replace("{}", name) for template in imagenet_templates()]
        mean = torch.stack([clip.encode_text_raw([text])[0] for text in texts]).mean(0)
        rows.append(mean / mean.norm())
    return torch.stack(rows)


def twin(
    clip: FrozenCLIP, text: Tensor, visual: Tensor, batch: Batch, k: int, per: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and terms of client `k`, with torch's own losses over its real images."""
    real = int(batch.mask_KB[k].sum())
    assert batch.inputs.pixels is not None
    t, t0 = twins.plain_text(clip, "a photo of a", list(text)), frozen_classes(clip)
    v = twins.plain_images(clip, batch.inputs.pixels[k, :real], list(visual))
    v0 = twins.plain_images(clip, batch.inputs.pixels[k, :real], []).detach()
    scale = clip.model.logit_scale.exp()
    z, z0 = scale * v @ t.T, scale * v0 @ t0.T
    kl = F.kl_div(z.log_softmax(1), z0.log_softmax(1), reduction="sum", log_target=True)
    return z, {
        "ce": F.cross_entropy(z, batch.labels_KB[k, :real]),
        "text": 25 * F.l1_loss(t, t0),
        "image": 10 * F.l1_loss(v, v0),
        "logits": kl / (z.numel() if per == "numel" else real),
    }


@pytest.mark.parametrize("per", ["numel", "batchmean"])
@pytest.mark.parametrize(
    "options",
    [
        {"text_depth": 3, "visual_depth": 2},
        {"text_depth": 1, "visual_depth": 9, "text_tokens": 2, "visual_tokens": 3},
    ],
)
def test_logits_terms_and_gradients_are_the_plain_ones(
    deep_clip: FrozenCLIP, options: dict[str, Any], per: str
) -> None:
    method, batch = make(deep_clip, kl_norm=per, **options), some_batch(deep_clip)
    shared = twins.moved(method.init_shared(1), K, 1)
    encoded = method.encode(shared, {})
    logits = method.logits(encoded, batch.inputs)
    loss_terms = method.loss_terms(shared, {}, encoded, batch)
    assert tuple(loss_terms) == TERMS
    for k in range(K):
        text, visual = (shared[n].detach()[k].clone().requires_grad_() for n in ("text", "visual"))
        expected, parts = twin(deep_clip, text, visual, batch, k, per)
        twins.close(logits[k, : len(expected)], expected)
        for name in TERMS:
            assert loss_terms[name][k].item() == pytest.approx(parts[name].item(), rel=1e-4)
            theirs = torch.autograd.grad(
                parts[name], [text, visual], retain_graph=True, allow_unused=True
            )
            ours = torch.autograd.grad(
                loss_terms[name][k], list(shared.values()), retain_graph=True, allow_unused=True
            )
            for a, b in zip(ours, theirs, strict=True):
                assert (a is None) == (b is None)
                if a is not None and b is not None:
                    twins.close(a[k], b)


def test_templates_are_the_sixty(deep_clip: FrozenCLIP) -> None:
    templates = imagenet_templates()
    assert len(set(templates)) == len(templates) == 60
    assert templates[0] == "a photo of a {}."
    assert all(t.endswith(".") and t.count("{}") == 1 for t in templates)
    twins.close(make(deep_clip).frozen_classes, frozen_classes(deep_clip))  # type: ignore[attr-defined]


def test_the_template_mean_is_of_features_that_are_not_normalised(deep_clip: FrozenCLIP) -> None:
    """CLIP's own ensembling normalises each template's features first: another vector."""
    templates = imagenet_templates()[:3]
    ours = template_mean(deep_clip, CLASS_NAMES, templates)
    zero_shot = deep_clip.zero_shot_classifier(CLASS_NAMES, templates)
    assert (ours - zero_shot).abs().max() > 1e-4


def test_anchors_follow_the_class_list(deep_clip: FrozenCLIP) -> None:
    """New classes have frozen features of their own, not those of the training classes."""
    other = make(deep_clip, ("forest", "airport", "pond"))
    anchors = other.frozen_classes  # type: ignore[attr-defined]
    assert anchors.shape == (3, deep_clip.embed_dim)
    start = {n: t[None] for n, t in other.init_shared(1).items()}
    assert other.logits(other.encode(start, None), twins.pictures(deep_clip, 1, 2)).shape == (
        1,
        2,
        3,
    )


def test_weights_scale_their_terms(deep_clip: FrozenCLIP) -> None:
    batch = some_batch(deep_clip)
    one = make(deep_clip, text_weight=1, image_weight=1, logits_weight=1)
    two = make(deep_clip, text_weight=2, image_weight=3, logits_weight=4)
    shared = twins.moved(one.init_shared(1), K, 1)
    a, b = (m.loss_terms(shared, {}, m.encode(shared, {}), batch) for m in (one, two))
    for name, factor in (("ce", 1), ("text", 2), ("image", 3), ("logits", 4)):
        twins.close(b[name], factor * a[name])


def test_at_no_distance_only_cross_entropy_is_left(deep_clip: FrozenCLIP) -> None:
    """KL(p0 || p) is zero at p = p0 and positive elsewhere; it is not symmetric."""
    method, batch = make(deep_clip), some_batch(deep_clip)
    shared = twins.moved(method.init_shared(1), K, 1)
    encoded = method.encode(shared, {})
    pixels = batch.inputs.pixels
    reached = method.vision.features(pixels, encoded["visual"])  # type: ignore[attr-defined]
    same = replace(batch, inputs=replace(batch.inputs, features=reached.detach()))
    method.frozen_classes = encoded["classes"][0].detach()  # type: ignore[attr-defined]
    loss_terms = method.loss_terms(shared, {}, encoded, same)
    assert loss_terms["image"].abs().max() < 1e-6
    assert loss_terms["logits"][0].abs() < 1e-6
    assert loss_terms["text"][0] == 0 < loss_terms["text"][1]


@pytest.mark.parametrize(
    "options", [{"text_tokens": 5}, {"visual_depth": 0}, {"kl_norm": "sum"}, {"text_weight": -1}]
)
def test_impossible_configs_are_refused(clip: FrozenCLIP, options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        make(clip, **options)
