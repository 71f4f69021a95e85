"""The factors of a mean of products against a plain SVD."""

from __future__ import annotations

import numpy as np
import pytest

from fedprompt.errors import UserError
from fedprompt.federation.registry import strategy_class
from fedprompt.federation.screening import Update

SHAPES = {"q.lora_A": (2, 3, 7), "q.lora_B": (2, 5, 3), "ctx": (4,)}


def test_best_rank_three_of_the_mean_and_its_error() -> None:
    draw = np.random.default_rng(0)
    arrays = [
        {n: draw.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()} for _ in range(4)
    ]
    images = [1, 2, 3, 4]
    updates = [Update(k, a, n) for k, (a, n) in enumerate(zip(arrays, images, strict=True))]
    cls = strategy_class("product_mean")
    strategy = cls(cls.Config(), shapes=SHAPES, seed=1)
    new = strategy.aggregate(1, arrays[0], updates)
    products = [a["q.lora_B"].astype(float) @ a["q.lora_A"] for a in arrays]
    mean = np.average(products, axis=0, weights=images)
    u, s, v = np.linalg.svd(mean, full_matrices=False)
    best = (u[..., :3] * s[:, None, :3]) @ v[:, :3]
    ours = new["q.lora_B"].astype(float) @ new["q.lora_A"]
    assert np.abs(ours - best).max() < 1e-5
    # The rows of A are orthonormal.
    a = new["q.lora_A"]
    assert np.abs(a @ a.swapaxes(-1, -2) - np.eye(3)).max() < 1e-6
    error = np.linalg.norm(ours - mean) / np.linalg.norm(mean)
    assert strategy.metrics()["product_error"] == pytest.approx(error, rel=1e-5)
    assert error > 0.05
    expected = np.average([u["ctx"] for u in arrays], axis=0, weights=images)
    assert np.abs(new["ctx"] - expected).max() < 1e-6


def test_an_untrained_adapter_can_still_learn() -> None:
    """Where all B are zero, the rows of A must not vanish: B's gradient is a product with A."""
    arrays = {
        n: (np.zeros(s) if n.endswith("B") else np.random.default_rng(1).random(s)).astype("f4")
        for n, s in SHAPES.items()
    }
    cls = strategy_class("product_mean")
    strategy = cls(cls.Config(), shapes=SHAPES, seed=1)
    new = strategy.aggregate(1, arrays, [Update(k, arrays, 1) for k in range(2)])
    assert not new["q.lora_B"].any()
    assert np.linalg.norm(new["q.lora_A"], axis=-1) == pytest.approx(1, abs=1e-5)
    assert strategy.metrics()["product_error"] == 0


def test_needs_pairs() -> None:
    cls = strategy_class("product_mean")
    with pytest.raises(UserError, match="lora_A"):
        cls(cls.Config(), shapes={"q.lora_B": (5, 3), "ctx": (4,)}, seed=1)
