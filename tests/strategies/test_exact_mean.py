"""A mean that keeps what float32 leaves of it."""

from __future__ import annotations

import numpy as np

from fedprompt.federation.registry import strategy_class
from fedprompt.federation.screening import Update
from fedprompt.messages import REST


def test_a_pair_is_averaged_in_double_precision_and_other_tensors_as_by_fedavg() -> None:
    draw = np.random.default_rng(0)
    whole = draw.standard_normal((5, 7))
    images = [3, 1, 20, 7, 7]
    rounded = whole.astype(np.float32)
    rest = (whole - rounded).astype(np.float32)
    updates = [
        Update(k, {"x": rounded[k], f"x{REST}": rest[k], "y": rounded[k]}, images[k])
        for k in range(5)
    ]
    shared = {name: np.zeros(7, dtype=np.float32) for name in ("x", f"x{REST}", "y")}
    means = {}
    for name in ("exact_mean", "fedavg"):
        cls = strategy_class(name)
        strategy = cls(cls.Config(), shapes={n: a.shape for n, a in shared.items()}, seed=1)
        means[name] = strategy.aggregate(1, shared, updates)
    expected = np.average(whole, axis=0, weights=images)
    ours = means["exact_mean"]
    assert all(a.dtype == np.float32 for a in ours.values())
    assert np.abs(ours["x"].astype(np.float64) + ours[f"x{REST}"] - expected).max() < 1e-14
    assert np.array_equal(ours["y"], means["fedavg"]["y"])
    lost = np.abs(means["fedavg"]["x"].astype(np.float64) + means["fedavg"][f"x{REST}"] - expected)
    assert lost.max() > 1e-9
