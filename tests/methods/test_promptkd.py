"""PromptKD: a twin with torch modules, a teacher of another width, and runs with a teacher."""

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
from fedprompt.experiment.workspaces import ResourceCache, open_workspace
from fedprompt.methods.base import uploaded_numbers
from tests.support import twins
from tests.support.builders import batch_of, random_clip, small_config

K, B = 2, 4
LABELS = torch.tensor([[0, 1, 2, 3], [5, 4, 0, 0]])
MASK = torch.tensor([[True] * 4, [True] * 3 + [False]])
TEACHER = "openai_vit_l14"


@pytest.fixture(scope="module")
def clip() -> FrozenCLIP:
    """A student of 32 dimensions, with a teacher of 48 beside it."""
    clip = random_clip(vision_cfg={"patch_size": 16, "layers": 3})
    clip.companions[TEACHER] = random_clip(embed_dim=48)
    clip.companions[TEACHER].logit_scale = 20.0
    return clip


@pytest.mark.parametrize(
    ("teacher", "projector", "tau", "norm"),
    [(TEACHER, "shared", 2.0, "numel"), (None, "private", 1.0, "batchmean")],
)
def test_twin(clip: FrozenCLIP, teacher: str | None, projector: str, tau: float, norm: str) -> None:
    options: dict[str, Any] = {"teacher": teacher, "projector": projector, "kl_norm": norm}
    method = twins.build(clip, "promptkd", visual_depth=2, temperature=tau, kd_weight=50, **options)
    shared, private = twins.tensors(method, clients=K)
    held, model = shared | private, clip.companions[TEACHER] if teacher else clip
    seen = twins.features(K, B, model.embed_dim, seed=4)
    inputs = twins.pictures(clip, K, B)
    # A teacher of its own looks at a column of its own.
    inputs = replace(inputs, teacher=seen) if teacher else replace(inputs, features=seen)
    # Labels that no class has: none is looked at.
    batch = batch_of(inputs, LABELS, MASK)
    batch = replace(batch, labels_KB=torch.full((K, B), -1))
    encoded = method.encode(shared, private)
    logits = method.logits(encoded, batch.inputs)
    terms = method.loss_terms(shared, private, encoded, batch)
    assert list(terms) == ["kd"]
    ours = dict(zip(held, twins.gradients(terms, list(held.values())), strict=True))
    classes = twins.template_features(model)
    width = model.embed_dim
    assert inputs.pixels is not None
    for k in range(K):
        leaves = {n: t.detach()[k].clone().requires_grad_() for n, t in held.items()}
        raw = twins.plain_images(clip, inputs.pixels[k], list(leaves["visual"]), raw=True)
        net = nn.Sequential(
            nn.Linear(clip.embed_dim, width),
            nn.LayerNorm(width),
            nn.ReLU(),
            nn.Linear(width, width),
        )
        places = {"up": 0, "norm": 1, "down": 3}
        weights = {
            f"{i}.{kind}": leaves[f"{part}.{kind}"]
            for part, i in places.items()
            for kind in ("weight", "bias")
        }
        out: Tensor = torch.func.functional_call(net, weights, (raw,))
        expected = clip.logit_scale * F.normalize(out, dim=-1) @ classes.T
        twins.close(logits[k], expected, "logits")
        target = (model.logit_scale * seen[k] @ classes.T)[MASK[k]]
        loss = F.kl_div(
            F.log_softmax(expected[MASK[k]] / tau, dim=1), F.softmax(target / tau, dim=1),
            reduction="sum",
        ) * tau**2  # fmt: skip
        loss = 50 * loss / (target.numel() if norm == "numel" else len(target))
        twins.close(terms["kd"][k], loss, "kd")
        theirs = torch.autograd.grad(loss, list(leaves.values()))
        for name, gradient in zip(leaves, theirs, strict=True):
            twins.close(ours[name][k], gradient, name)


@pytest.mark.parametrize(
    ("options", "numbers"), [({}, 1_013_760), ({"projector": "private"}, 27_648)]
)
def test_upload_on_vit_b16_with_a_teacher_of_768(options: dict[str, Any], numbers: int) -> None:
    clip = shape_only_clip("ViT-B-16")
    clip.companions[TEACHER] = random_clip(embed_dim=768)
    method = twins.build(clip, "promptkd", teacher=TEACHER, **options)
    assert uploaded_numbers(method) == numbers
    assert method.has_global == (not options)


def test_teacher_features_are_a_column_in_training() -> None:
    """The tiny CLIP as its own teacher: the column and the classes are the backbone's own."""
    resources = ResourceCache()
    for base in (False, True):
        method: dict[str, Any] = {"name": "promptkd", "teacher": "tiny"}
        if base:
            method = {"name": "fedprox", "base": "promptkd", "options": {"teacher": "tiny"}}
        config = small_config(
            method=method,
            data={"images_per_class": 2, "domains": ["delta"], "views": 2},
            partition={"clients": 1, "unlabelled_clients": 1},
        )
        workspace = open_workspace(config, resources=resources)
        inputs = workspace.train_data(0).inputs
        assert inputs.teacher is not None
        assert torch.equal(inputs.teacher, inputs.features)
        assert workspace.test_data(0)[0].teacher is None, "tests are read without the teacher"


def test_bad_input_is_refused(clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match=r"openai_vit_l14"):
        twins.build(clip, "promptkd", teacher="openai_vit_l15")
    with pytest.raises(UserError, match="openai_vit_b32"):
        twins.build(clip, "promptkd", teacher="openai_vit_b32")  # a config, but not opened
    for key, value in (("kd_weight", 0), ("temperature", 0), ("projector", "none")):
        with pytest.raises(UserError, match=key):
            twins.build(clip, "promptkd", **{key: value})


def test_a_resnet_is_refused_in_one_line() -> None:
    resnet = random_clip(vision_cfg={"layers": [1, 1, 1, 1], "image_size": 64, "width": 8})
    with pytest.raises(UserError, match="ViT"):
        twins.build(resnet, "promptkd")
