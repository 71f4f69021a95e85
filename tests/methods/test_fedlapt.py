"""FedLAPT: a twin of its loss on mixed features; the distribution of lambda; the words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.methods.base import Task, uploaded_numbers
from tests.support import twins
from tests.support.builders import CLASS_NAMES
from tests.support.twins import K

SMALL = {"context_tokens": 2, "negatives": 7}
TEMPLATES = ("a photo of a {}.", "a drawing of the {}.")


def test_twin(clip: FrozenCLIP) -> None:
    task = Task(CLASS_NAMES, TEMPLATES)
    method: Any = twins.build(clip, "fedlapt", task, **SMALL)
    shared, private = twins.tensors(method)
    batch = twins.batch(clip)
    terms = twins.loss_of(method, shared, private, batch)
    leaves = [shared["ctx"], shared["ctx_ood"]]
    ours = torch.autograd.grad(terms["ce"].sum(), leaves)
    lambdas, templates = batch.uniform((1,), "lambda"), batch.uniform((twins.B,), "template")
    texts = [clip.zero_shot_classifier(CLASS_NAMES, [template]) for template in TEMPLATES]
    words = twins.build(clip, "promptfl", Task(method.words), context_tokens=2)
    theirs = torch.zeros(())
    for k in range(K):
        classes = twins.class_features(clip, shared["ctx"][k])
        others = words.encode({"ctx": shared["ctx_ood"][k][None]}, None)["classes"][0]
        part = method.levels[int(lambdas[k] * 1024)]
        losses = []
        for i in range(int(batch.mask_KB[k].sum())):
            label = int(batch.labels_KB[k, i])
            text = texts[int(templates[k, i] * 2)][label]
            mixed = part * batch.inputs.features[k, i] + (1 - part) * text
            every = torch.cat([classes, others]) @ (mixed / mixed.norm())
            losses.append(-(clip.logit_scale * every).log_softmax(0)[label])
        loss = 0.5 * torch.stack(losses).mean()
        twins.close(terms["ce"][k], loss, "ce")
        theirs = theirs + loss
    for found, expected in zip(ours, torch.autograd.grad(theirs, leaves), strict=True):
        twins.close(found, expected, "gradient")


@pytest.mark.parametrize("mix", [0.1, 1.0])
def test_lambda_is_the_smaller_half_of_a_beta(clip: FrozenCLIP, mix: float) -> None:
    levels = twins.build(clip, "fedlapt", mix=mix, **SMALL).levels.double().numpy()  # type: ignore[attr-defined]
    draws = np.random.default_rng(0).beta(mix, mix, 200_000)
    draws = np.minimum(draws, 1 - draws)
    assert levels.min() >= 0
    assert levels.max() <= 0.5
    assert levels.mean() == pytest.approx(draws.mean(), abs=2e-3)
    assert np.quantile(levels, 0.9) == pytest.approx(np.quantile(draws, 0.9), abs=5e-3)


def test_novelty_is_the_probability_of_the_words(clip: FrozenCLIP) -> None:
    method: Any = twins.build(clip, "fedlapt", **SMALL)
    shared, private = twins.tensors(method)
    inputs = twins.batch(clip).inputs
    with torch.no_grad():
        encoded = method.encode(shared, private)
        every = torch.cat([encoded["classes"], encoded["negatives"]], 1)
        p = (clip.logit_scale * inputs.features @ every.transpose(1, 2)).softmax(-1)
        twins.close(method.novelty(encoded, inputs), 1 - p[..., :6].sum(-1))
        assert torch.equal(
            method.logits(encoded, inputs),
            clip.logit_scale * (inputs.features @ encoded["classes"].transpose(1, 2)),
        )
    assert F.normalize(encoded["negatives"], dim=-1).shape[1] == len(set(method.words)) == 7


def test_upload_on_vit_b16() -> None:
    assert uploaded_numbers(twins.build(shape_only_clip("ViT-B-16"), "fedlapt")) == 2 * 16 * 512


def test_more_words_than_the_list_has(clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match="negatives"):
        twins.build(clip, "fedlapt", negatives=5000)
