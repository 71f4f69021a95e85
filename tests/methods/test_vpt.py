"""VPT against a plain twin: visual prompts alone, the text stays as it is written."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import build
from fedprompt.errors import UserError
from fedprompt.methods.base import Method, Task
from fedprompt.methods.parts.deep_prompts import layers_within
from fedprompt.methods.registry import method_class
from tests.support import twins
from tests.support.builders import CLASS_NAMES, batch_of, random_clip

K, B = 2, 5
LABELS = torch.tensor([[0, 1, 2, 3, 3], [5, 4, 0, 0, 1]])


@pytest.fixture(scope="module")
def deep_clip() -> FrozenCLIP:
    return random_clip(vision_cfg={"layers": 4})


def make(clip: FrozenCLIP, task: Task | None = None, **options: Any) -> Method:
    cls = method_class("vpt")
    config = build(cls.Config, {"name": "vpt", **options}, "method")
    return cls(config, clip, task or Task(CLASS_NAMES))


@pytest.mark.parametrize("depth", [1, 3, 12])
def test_logits_loss_and_gradients_are_the_plain_ones(deep_clip: FrozenCLIP, depth: int) -> None:
    method = make(deep_clip, depth=depth)
    shared = twins.moved(method.init_shared(1), K, 1)
    assert shared["visual"].shape == (K, min(depth, 4), 8, 64)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    batch = batch_of(twins.pictures(deep_clip, K, B), LABELS, mask)
    encoded = method.encode(shared, {})
    logits = method.logits(encoded, batch.inputs)
    loss_terms = method.loss_terms(shared, {}, encoded, batch)
    assert list(loss_terms) == ["ce"]
    ours = torch.autograd.grad(loss_terms["ce"].sum(), shared["visual"])[0]
    text = deep_clip.encode_text_raw([f"a photo of a {c}." for c in CLASS_NAMES])
    for k in range(K):
        leaf = shared["visual"].detach()[k].clone().requires_grad_()
        assert batch.inputs.pixels is not None
        images = twins.plain_images(deep_clip, batch.inputs.pixels[k], list(leaf))
        expected = deep_clip.model.logit_scale.exp() * images @ F.normalize(text, dim=-1).T
        twins.close(logits[k], expected)
        real = int(mask[k].sum())
        loss = F.cross_entropy(expected[:real], LABELS[k, :real])
        assert loss_terms["ce"][k].item() == pytest.approx(loss.item(), rel=1e-4)
        twins.close(ours[k], torch.autograd.grad(loss, leaf)[0])


def test_missing_layers_are_logged_once(
    deep_clip: FrozenCLIP, caplog: pytest.LogCaptureFixture
) -> None:
    layers_within.cache_clear()
    for _ in range(2):
        make(deep_clip, depth=12)
        make(deep_clip, depth=4)
    (record,) = caplog.records
    assert record.args == (12, "image", 4)


def test_both_starts(deep_clip: FrozenCLIP) -> None:
    normal = make(deep_clip, tokens=64).init_shared(1)["visual"]
    assert normal.std().item() == pytest.approx(0.02, rel=0.05)
    uniform = make(deep_clip, tokens=64, init="vpt").init_shared(1)["visual"]
    bound = math.sqrt(6 / (3 * 8 * 8 + 64))  # patches of 8 x 8, width 64
    assert 0.99 * bound < uniform.abs().max() <= bound
    assert uniform.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert uniform.mean().abs() < 0.01


def test_the_text_is_the_template_or_the_data_sets(deep_clip: FrozenCLIP) -> None:
    task = Task(("wheat_field", "river"), ("satellite: {}.", "a map of {}."))
    fixed = make(deep_clip, task).encode({"visual": torch.zeros(1, 1, 1, 64)}, {})["classes"]
    expected = deep_clip.encode_text_raw(["a photo of a wheat field.", "a photo of a river."])
    twins.close(fixed[0], F.normalize(expected, dim=-1), rtol=1e-6)
    own = make(deep_clip, task, template=None).encode({"visual": torch.zeros(1)}, {})["classes"]
    both = deep_clip.zero_shot_classifier(("wheat field", "river"), task.templates)
    twins.close(own[0], both, rtol=1e-6)


def test_config_errors(deep_clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match=r"one \{\} for the class"):
        make(deep_clip, template="a photo")
    with pytest.raises(UserError, match="depth is 0; it must be at least 1"):
        make(deep_clip, depth=0)
