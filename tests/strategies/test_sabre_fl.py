from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprompt.errors import UserError
from fedprompt.experiment.backdoor_detector import logistic_regression, separation
from fedprompt.federation.registry import strategy_class
from fedprompt.federation.screening import Update
from fedprompt.federation.strategy import SharedPromptStrategy

SHAPES = {"ctx": (2,), "embeddings": (3, 4)}


def detector(tmp_path: Path, content: Any) -> str:
    path = tmp_path / "detector.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def make(
    name: str | None, shapes: dict[str, tuple[int, ...]] = SHAPES, **more: Any
) -> SharedPromptStrategy:
    cls = strategy_class("sabre_fl")
    return cls(cls.Config(detector=name, **more), shapes=shapes, seed=1)


def test_the_highest_scores_are_left_out(tmp_path: Path) -> None:
    strategy = make(detector(tmp_path, {"weight": [2, 0, 0, 0], "bias": -1}), attackers=0.34)
    shared = {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}
    updates = []
    for client, height in enumerate((0.1, 0.9, 0.2)):
        embeddings = np.zeros((3, 4), np.float32)
        embeddings[:, 0] = height, height, 0
        arrays = {"ctx": np.full(2, 1.0 + client, np.float32), "embeddings": embeddings}
        updates.append(Update(client, arrays, 10 * (client + 1)))
    after = strategy.aggregate(1, shared, updates)
    # Clients 0 and 2 remain, with 10 and 30 images.
    np.testing.assert_allclose(after["ctx"], (10 * 1 + 30 * 3) / 40)
    assert (after["embeddings"] == 0).all(), "embeddings are not sent to other clients"
    found = strategy.metrics()
    assert found["left_out"] == [1]

    def sigmoid(x: float) -> float:
        return float(1 / (1 + np.exp(-x)))

    for client, height in enumerate((0.1, 0.9, 0.2)):
        expected = (2 * sigmoid(2 * height - 1) + sigmoid(-1)) / 3
        assert found["scores"][str(client)] == pytest.approx(expected)


def test_what_cannot_be_used_is_refused_in_one_line(tmp_path: Path) -> None:
    good = {"weight": [1, 0, 0, 0], "bias": 0}
    cases: list[tuple[Any, dict[str, tuple[int, ...]], str]] = [
        (good, {"ctx": (2,)}, "'embeddings'"),
        (good, {"ctx": (2,), "embeddings": (3, 5)}, "have 5"),
        ({"weight": [1, 2]}, SHAPES, "must hold 'weight'"),
        ("no json", SHAPES, "must hold 'weight'"),
        ({"weight": [1, 2, 3, float("nan")], "bias": 0}, SHAPES, "finite"),
    ]
    for content, shapes, words in cases:
        with pytest.raises(UserError, match=words) as error:
            make(detector(tmp_path, content), shapes)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"strategy\.detector: nowhere"):
        make("nowhere")


def test_the_detector_is_a_penalised_logistic_regression() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    draw = np.random.default_rng(0)
    clean = draw.standard_normal((40, 3))
    bad = draw.standard_normal((40, 3)) + np.array([1, 0, 0])
    weight, bias = logistic_regression(clean, bad, penalty=0.01)
    # scikit-learn minimises C times the summed loss plus half the squared norm.
    plain = linear.LogisticRegression(C=1 / (2 * 0.01 * 80), tol=1e-10, max_iter=1000)
    plain.fit(np.concatenate([clean, bad]), np.repeat([0, 1], 40))
    np.testing.assert_allclose(weight, plain.coef_[0], rtol=1e-3, atol=1e-4)
    assert bias == pytest.approx(plain.intercept_[0], abs=1e-3)


def test_separation_counts_pairs() -> None:
    clean, bad = np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0])
    pairs = [(b > c) + 0.5 * (b == c) for b in bad for c in clean]
    assert separation(clean, bad) == pytest.approx(np.mean(pairs))


def test_the_shipped_detector_is_for_the_embedded_clip_alone() -> None:
    shapes = {"ctx": (2,), "embeddings": (3, 128)}
    make(None, shapes)
    with pytest.raises(
        UserError, match=r"strategy\.detector is null.*512.*train_backdoor_detector"
    ):
        make(None, {**shapes, "embeddings": (3, 512)})
    assert not strategy_class("sabre_fl").works_without_rounds()
    assert not strategy_class("sabre_fl").needs_only_the_mean()
