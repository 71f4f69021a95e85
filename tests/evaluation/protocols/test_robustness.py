"""PGD against a plain twin, its bounds, and accuracy under attack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.errors import UserError
from fedprompt.evaluation.perturbations import (
    correct_under_attack,
    logits_of_pixels,
    open_pixels,
    perturbed,
    starts,
)
from fedprompt.evaluation.registry import compare_runs, open_protocols
from fedprompt.reports.run_data import load_run
from fedprompt.scoring import encode_global
from tests.support import twins
from tests.support.builders import fake_dataset, small_config
from tests.support.protocol_runs import summary_of

EPS, STEPS = 8 / 255, 3


def images(clip: FrozenCLIP) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    pixels = torch.rand(4, 3, *clip.model.visual.image_size, generator=draws)
    return pixels, torch.tensor([0, 1, 2, 5]), starts(pixels, [7, 3, 9, 1], 1)


@pytest.mark.parametrize("name", ["zero_shot", "vpt"])
def test_the_attack_is_that_of_a_twin(clip: FrozenCLIP, name: str) -> None:
    method = twins.build(clip, name)
    shared = {n: 10 * t for n, t in method.init_shared(1).items()}
    encoded = encode_global(method, shared)
    pixels, labels, start = images(clip)
    found = perturbed(method, encoded, pixels, labels, start, EPS, STEPS)
    mean, std = clip.mean_std[:, :, None, None]
    prompts = list(shared["visual"]) if name == "vpt" else []
    text = twins.template_features(clip)
    expected = []
    for image, label, direction in zip(pixels, labels, start, strict=True):
        x = (image + EPS * direction).clamp(0, 1)
        for _ in range(STEPS):
            x = x.detach().requires_grad_()
            feature = twins.plain_images(clip, ((x - mean) / std)[None], prompts)
            loss = F.cross_entropy(clip.logit_scale * feature @ text.T, label[None])
            (gradient,) = torch.autograd.grad(loss, x)
            x = x.detach() + 2.5 * EPS / STEPS * gradient.sign()
            x = torch.minimum(torch.maximum(x, image - EPS), image + EPS).clamp(0, 1)
        expected.append(x)
    # A gradient of nearly zero may have another sign.
    same = (found - torch.stack(expected)).abs() < 1e-6
    assert float(same.double().mean()) > 0.999
    assert float((found - pixels).abs().max()) <= EPS + 1e-6
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    before, after = (
        F.cross_entropy(logits_of_pixels(method, encoded, x).detach(), labels)
        for x in (pixels, found)
    )
    assert after > before


def test_starts_belong_to_images(clip: FrozenCLIP) -> None:
    pixels = torch.zeros(2, 3, 4, 4)
    first, second = starts(pixels, [7, 3], 1)
    assert torch.equal(starts(pixels, [3, 7], 1)[0], second)
    assert not torch.equal(first, second)
    assert -1 <= float(first.min()) < -0.5 < 0.5 < float(first.max()) <= 1


def test_pixels_are_those_that_the_backbone_sees(clip: FrozenCLIP) -> None:
    dataset = fake_dataset()
    pixels = open_pixels(clip, dataset, [100])
    assert pixels[0, 0].mean() == pytest.approx(100 / 255, abs=1e-5)
    method = twins.build(clip, "zero_shot")
    found = logits_of_pixels(method, encode_global(method, {}), pixels)
    feature = clip.encode_images(clip.preprocess(dataset.open_image(100))[None])
    expected = F.normalize(feature, dim=-1) @ twins.template_features(clip).T
    twins.close(found, clip.logit_scale * expected)


def test_larger_changes_leave_fewer_images(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "zero_shot")
    encoded = encode_global(method, {})
    pixels, _, start = images(clip)
    labels = logits_of_pixels(method, encoded, pixels).argmax(-1)
    counts = correct_under_attack(method, encoded, pixels, labels, start, [1e-6, 0.5], 5)
    assert counts[:2] == [4, 4]
    assert counts[2] < 4


def test_a_run_reports_every_model(runs: Callable[..., Path]) -> None:
    folder = runs("robustness")
    part = summary_of(folder)["protocols"]["robustness"]
    assert part["eps"] == [0, 4.0]
    rows = {row["model"]: row for row in part["rows"]}
    assert list(rows) == ["zero-shot", "global", "personal"]
    assert rows["global"]["images"] == 12
    assert rows["personal"]["images"] == 8
    assert all(row["accuracy"][1] <= row["accuracy"][0] for row in part["rows"])
    table, _ = compare_runs("robustness", [load_run(folder)])
    assert len(table.rows) == 6


def test_methods_that_read_patches_are_refused(make_workspace: Callable[..., Any]) -> None:
    workspace = make_workspace(method={"name": "promptfl"}, protocols=["robustness"])
    workspace.method.needs = frozenset({"features", "patches"})
    (protocol,) = open_protocols(workspace.config)
    with pytest.raises(UserError, match=r"robustness.*promptfl.*patches"):
        protocol.open(workspace)


@pytest.mark.parametrize("eps", [[], [0.0], [256.0]])
def test_impossible_sizes_are_refused(eps: list[float]) -> None:
    with pytest.raises(UserError, match="eps"):
        small_config(protocols=["robustness"], protocol_options={"robustness": {"eps": eps}})
