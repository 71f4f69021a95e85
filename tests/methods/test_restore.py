"""RESTORE: a twin with torch modules in both spaces, the growth of its ratios, its statistics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import run
from fedprompt.methods.base import ClientData, uploaded_numbers
from fedprompt.reports.run_data import load_run
from fedprompt.reports.run_figures import statistics_figure
from tests.support import twins
from tests.support.builders import batch_of, random_clip, small_config
from tests.support.protocol_runs import silent

K, B = 2, 4
LABELS = torch.tensor([[0, 1, 2, 3], [5, 4, 0, 0]])
MASK = torch.tensor([[True] * 4, [True] * 3 + [False]])
OPTIONS: dict[str, Any] = {"depth": 3, "shift_weight": 2.0, "visual_ratio": 0.05}
SHIFT = torch.tensor([[0.0, 0.0], [3.0, 5.0]])
"""What the two clients' ratios have grown by."""


@pytest.fixture(scope="module")
def clip() -> FrozenCLIP:
    return random_clip(vision_cfg={"patch_size": 16, "layers": 3})


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def calibrated(features: Tensor, tensors: dict[str, Tensor], name: str, ratio: float) -> Tensor:
    width = features.shape[-1]
    net = nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width), QuickGELU(), nn.Linear(4 * width, width)
    )
    places = {"norm": 0, "up": 1, "down": 3}
    weights = {
        f"{i}.{kind}": tensors[f"{name}.{part}.{kind}"]
        for part, i in places.items()
        for kind in ("weight", "bias")
    }
    out = features + torch.func.functional_call(net, weights, (features,))
    return ratio * out + (1 - ratio) * features


def size(prompt: Tensor) -> Tensor:
    return torch.norm(prompt.t() @ prompt)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize(("calibrators", "space"), [("private", "prompt"), ("shared", "feature")])
def test_twin(clip: FrozenCLIP, calibrators: str, space: str) -> None:
    options = {"calibrators": calibrators, "shift_space": space}
    method: Any = twins.build(clip, "restore", **OPTIONS, **options)
    shared, private = twins.tensors(method, clients=K)
    private = private | {"shift": SHIFT}
    held = {n: t for n, t in (shared | private).items() if t.requires_grad}
    batch = batch_of(twins.pictures(clip, K, B), LABELS, MASK)
    terms = twins.loss_of(method, shared, private, batch)
    minimised = {n: t for n, t in terms.items() if n not in method.measured}
    assert list(terms) == ["ce", "shift", "text_shift", "visual_shift"]
    ours = dict(zip(held, twins.gradients(minimised, list(held.values())), strict=True))
    assert batch.inputs.pixels is not None
    start = method.init_shared(1)
    for k in range(K):
        leaves = {n: t.detach()[k].clone().requires_grad_() for n, t in held.items()}
        text = list(leaves["text"])
        factors = zip(text, leaves["weight"], leaves["bias"], strict=True)
        visual = [p @ w.T + b for p, w, b in factors]
        images = twins.plain_images(clip, batch.inputs.pixels[k], visual, raw=True)[MASK[k]]
        classes = twins.plain_text(clip, "a photo of a", text, raw=True)
        mixed = [
            unit(calibrated(f, leaves, name, ratio))
            for f, name, ratio in (
                (images, "visual_calibrator", 0.05 + 0.005 * float(SHIFT[k, 1])),
                (classes, "text_calibrator", 0.1 + 0.02 * float(SHIFT[k, 0])),
            )
        ]
        logits = clip.logit_scale * mixed[0] @ mixed[1].T
        if space == "prompt":
            first = [
                p @ w.T + b
                for p, w, b in zip(start["text"], start["weight"], start["bias"], strict=True)
            ]
            apart = sum(
                (size(text[j]) / size(start["text"][j]) - size(visual[j]) / size(first[j])) ** 2
                for j in (1, 2)
            )
            shifts = [(size(p[1]) + size(p[2])) / 2 for p in (text, visual)]
        else:
            away = unit(classes) - twins.template_features(clip)
            shifts = [away.norm(dim=-1).mean()]
            shifts += [(unit(images) - batch.inputs.features[k][MASK[k]]).norm(dim=-1).mean()]
            apart = (shifts[0] - shifts[1]) ** 2
        expected = {"ce": F.cross_entropy(logits, LABELS[k][MASK[k]]), "shift": 2 * apart}
        measured = dict(zip(("text_shift", "visual_shift"), shifts, strict=True))
        for name, value in (expected | measured).items():
            twins.close(terms[name][k], value, name)
        theirs = torch.autograd.grad(sum(expected.values()), leaves.values())  # type: ignore[arg-type]
        for name, gradient in zip(leaves, theirs, strict=True):
            twins.close(ours[name][k], gradient, name)


def test_ratios_grow_once_after_a_third_of_the_run(clip: FrozenCLIP) -> None:
    """Ten rounds: rounds 1 to 3 leave the ratios as they are, as the code's epochs 0 to 2 do."""
    method: Any = twins.build(clip, "restore", **OPTIONS)
    shared, private = twins.tensors(method, clients=K)
    info = batch_of(twins.pictures(clip, K, B), LABELS).round_info
    assert info.rounds == 10
    _, kept = method.end_round(shared, private, replace(info, server_round=3))
    assert not kept["shift"].any()
    _, kept = method.end_round(shared, private, replace(info, server_round=4))
    visual = method.encode(shared, private)["visual"]
    for k in range(K):
        for i, prompts in enumerate((shared["text"][k], visual[k])):
            expected = (size(prompts[1]) + size(prompts[2])) / 2
            twins.close(kept["shift"][k, i], expected)
    moved = {n: 2 * t for n, t in shared.items()}
    _, later = method.end_round(moved, kept, replace(info, server_round=9))
    assert torch.equal(later["shift"], kept["shift"])


def test_the_global_model_is_maple_if_calibrators_are_private(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "restore", **OPTIONS)
    maple = twins.build(clip, "maple", depth=3, sharing="factors")
    shared, private = twins.tensors(method, clients=1)
    inputs = twins.pictures(clip, 1, B)
    ours = method.logits(method.encode(shared, None), inputs)
    twins.close(ours, maple.logits(maple.encode(shared, None), inputs))
    assert (method.logits(method.encode(shared, private), inputs) - ours).abs().max() > 1e-3


def test_a_wrapper_minimises_the_terms_alone(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedprox", base="restore", options={"depth": 2})
    assert method.measured == {"text_shift", "visual_shift"}
    inputs = twins.pictures(clip, 1, B)[0]
    data = ClientData(0, inputs, torch.arange(B))
    start = [method.init_shared(1)], [method.init_private(1, 0)]
    (result,) = twins.train(method, *start, [data], twins.config(), 1)
    parts = [value for name, value in result.losses.items() if name != "loss"]
    assert result.losses["loss"] == pytest.approx(sum(parts))
    assert set(result.statistics) == method.measured


def test_shifts_reach_the_metrics_and_the_report(tmp_path: Path) -> None:
    config = small_config(
        method={"name": "restore", "depth": 2},
        strategy={"name": "auto"},
        data={"images_per_class": 2, "domains": ["delta"]},
        partition={"clients": 2, "scheme": "iid", "local_test_fraction": 0.0},
        federation={"rounds": 2},
        output={"dir": str(tmp_path / "run")},
    )
    folder = run(config, QuietDisplay(silent()))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    for line in lines[1:]:
        assert set(line["statistics"]) == {"text_shift", "visual_shift"}
        for statistic in line["statistics"].values():
            assert 0 < statistic["mean"] <= statistic["max"]
            assert statistic["std"] >= 0
        assert set(line["train"]) == {"loss", "loss-ce", "loss-shift"}
        assert line["train"]["loss"] == pytest.approx(
            line["train"]["loss-ce"] + line["train"]["loss-shift"]
        )
    figure = statistics_figure(load_run(folder))
    assert figure is not None
    assert [panel.y.label for panel in figure.panels] == ["Text shift", "Visual shift"]
    assert list(figure.panels[0].curves[0].x) == [1, 2]


@pytest.mark.parametrize(
    ("options", "numbers"),
    [({}, 3_555_072), ({"calibrators": "shared"}, 7_756_544), ({"sharing": "text"}, 9_216)],
)
def test_upload_on_vit_b16(options: dict[str, Any], numbers: int) -> None:
    assert uploaded_numbers(twins.build(shape_only_clip("ViT-B-16"), "restore", **options)) == (
        numbers
    )


@pytest.mark.parametrize(
    ("key", "value"), [("text_ratio", -1), ("shift_space", "pixel"), ("calibrators", "none")]
)
def test_bad_options(clip: FrozenCLIP, key: str, value: Any) -> None:
    with pytest.raises(UserError, match=key):
        twins.build(clip, "restore", **{key: value})
