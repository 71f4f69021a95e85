"""Scores against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fedprompt.scoring as evaluation
from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Task
from fedprompt.methods.registry import method_class
from fedprompt.rng import generator
from fedprompt.scoring import personal_statistics, score_global, score_personal
from tests.support.builders import CLASS_NAMES


def images(n: int, dim: int, *purpose: str | int) -> tuple[Inputs, torch.Tensor]:
    draw = generator(0, "images", *purpose)
    features = torch.from_numpy(draw.standard_normal((n, dim))).float()
    return Inputs(F.normalize(features, dim=-1)), torch.from_numpy(draw.integers(0, 6, n))


def test_statistics_by_hand() -> None:
    known = personal_statistics([0.5, 1.0, 0.0, 0.7])
    assert known is not None
    assert known.mean == pytest.approx(0.55)
    assert known.std == pytest.approx(np.std([0.5, 1.0, 0.0, 0.7], ddof=1))
    assert known.worst == 0.0
    # Sorted 0, .5, .7, 1: the 10th percentile lies 0.3 of the way from the first to the second.
    assert known.p10 == pytest.approx(0.15)
    assert known.clients_tested == 4
    assert personal_statistics([]) is None


def test_personal_scores_equal_one_model_at_a_time(
    clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = method_class("fedrsclip")
    method = cls(cls.Config(), clip, Task(CLASS_NAMES))
    shared = method.init_shared(1)
    private = [method.init_private(1, k) for k in range(3)]
    tests = [images(n, clip.embed_dim, n) for n in (7, 0, 12)]
    common = images(50, clip.embed_dim, "common")
    monkeypatch.setattr(cls, "images_at_once", 30)  # several pieces, an uneven last one
    own, everyone = score_personal(method, [shared] * 3, private, tests, common)
    assert everyone is not None
    for k, (inputs, labels) in enumerate(tests):
        encoded = method.encode(
            {n: t[None] for n, t in shared.items()}, {n: t[None] for n, t in private[k].items()}
        )
        for score, (x, y) in ((own[k], (inputs, labels)), (everyone[k], common)):
            logits = method.logits(encoded, x.of_one())[0]
            assert score.tested == len(y)
            assert score.correct == int((logits.argmax(-1) == y).sum())
            expected = float(F.cross_entropy(logits, y, reduction="sum"))
            assert score.loss_sum == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert own[1].accuracy is None


@pytest.mark.parametrize("name", ["promptfl", "fedrsclip", "zero_shot"])
@pytest.mark.parametrize("same", [True, False])
def test_clients_of_all_sizes_equal_one_at_a_time(
    clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch, name: str, same: bool
) -> None:
    cls = method_class(name)
    method = cls(cls.Config(), clip, Task(CLASS_NAMES))
    sizes = (3, 40, 0, 5, 11, 9, 1)
    shared = [method.init_shared(1 if same else k) for k in range(len(sizes))]
    private = [method.init_private(1, k) for k in range(len(sizes))]
    tests = [images(n, clip.embed_dim, k) for k, n in enumerate(sizes)]
    monkeypatch.setattr(cls, "images_at_once", 24)
    before = clip.positions_encoded
    own, _ = score_personal(method, shared, private, tests)
    encoded = clip.positions_encoded - before
    for k, test in enumerate(tests):
        (alone,), _ = score_personal(method, [shared[k]], [private[k]], [test])
        assert (own[k].correct, own[k].tested) == (alone.correct, alone.tested)
        assert own[k].loss_sum == pytest.approx(alone.loss_sum, rel=1e-5)
    if same and name == "promptfl":
        _ = score_global(method, shared[0], *tests[0])
        assert clip.positions_encoded - before - encoded == (len(sizes) + 1) * encoded


def test_groups_of_similar_sizes() -> None:
    groups = evaluation._similar_sizes([3, 40, 0, 5, 11, 9, 1], 4096)
    assert groups == [[1], [4, 5], [3, 0], [6]]


def test_global_score_uses_shared_prompts_only(clip: FrozenCLIP) -> None:
    cls = method_class("fedrsclip")
    method = cls(cls.Config(), clip, Task(CLASS_NAMES))
    plain = method_class("promptfl")
    same = plain(plain.Config(context_tokens=4), clip, Task(CLASS_NAMES))
    inputs, labels = images(60, clip.embed_dim)
    shared = method.init_shared(1)
    assert score_global(method, shared, inputs, labels) == score_global(
        same, shared, inputs, labels
    )


def test_zero_shot_agrees_with_plain_open_clip(clip: FrozenCLIP) -> None:
    cls = method_class("zero_shot")
    templates = ("a photo of a {}.", "an aerial photo of {}.")
    method = cls(cls.Config(), clip, Task(CLASS_NAMES, templates))
    inputs, labels = images(60, clip.embed_dim)
    text = [
        F.normalize(clip.encode_text_raw([t.format(c) for c in CLASS_NAMES]), dim=-1)
        for t in templates
    ]
    classes = F.normalize((text[0] + text[1]) / 2, dim=-1)
    expected = int(((inputs.features @ classes.T).argmax(-1) == labels).sum())
    score = score_global(method, {}, inputs, labels)
    assert score is not None
    assert score.correct == expected


def test_local_methods_have_no_global_model(clip: FrozenCLIP) -> None:
    cls = method_class("coop_local")
    method = cls(cls.Config(context_tokens=4), clip, Task(CLASS_NAMES))
    assert score_global(method, {}, *images(5, clip.embed_dim)) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_without_a_finite_answer_are_wrong(clip: FrozenCLIP, bad: float) -> None:
    """`argmax` of NaN is class 0, so that images of class 0 would be right."""
    cls = method_class("fedrsclip")
    method = cls(cls.Config(), clip, Task(CLASS_NAMES))
    shared = method.init_shared(1)
    broken = {n: torch.full_like(t, bad) for n, t in shared.items()}
    inputs, _ = images(5, clip.embed_dim)
    test = inputs, torch.zeros(5, dtype=torch.int64)
    score = score_global(method, broken, *test)
    assert score is not None
    assert (score.correct, score.tested, score.unanswered) == (0, 5, 5)
    private = [method.init_private(1, k) for k in range(2)]
    own, common = score_personal(method, [shared, broken], private, [test, test], test)
    assert common is not None
    for scores in (own, common):
        assert [s.unanswered for s in scores] == [0, 5]
        assert [s.correct for s in scores][1] == 0
