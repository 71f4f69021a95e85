from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedprompt.federation.registry import strategy_class
from fedprompt.federation.screening import Update
from fedprompt.strategies.flame import cosine_distances, largest_cluster

Rows = NDArray[np.float64]


def models(seed: int, clients: int, attackers: int) -> Rows:
    """Honest models around one direction, and attackers' around another."""
    draw = np.random.default_rng(seed)
    honest, other = draw.standard_normal((2, 8))
    rows = np.where(np.arange(clients)[:, None] < attackers, other, honest)
    return np.asarray(rows + 0.3 * draw.standard_normal((clients, 8)))


def step(rows: Rows, **options: Any) -> tuple[Rows, Any]:
    """A step from G, where client i sends row i."""
    cls = strategy_class("flame")
    strategy = cls(cls.Config(**options), shapes={"ctx": (2, 4)}, seed=3)
    start = np.arange(8, dtype=np.float32).reshape(2, 4)
    updates = [
        Update(i, {"ctx": row.reshape(2, 4).astype(np.float32)}, 10 + i)
        for i, row in enumerate(rows)
    ]
    after = strategy.aggregate(1, {"ctx": start}, updates)
    return after["ctx"].astype(np.float64).ravel(), strategy.metrics()


@pytest.mark.parametrize(("clients", "attackers"), [(3, 1), (7, 3), (10, 3), (10, 0), (2, 0)])
def test_the_cluster_is_that_of_hdbscan(clients: int, attackers: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    for seed in range(5):
        distance = cosine_distances(models(seed, clients, attackers))
        found = largest_cluster(distance)
        # scikit-learn counts a point among its own samples, the paper's library does not.
        labels = cluster.HDBSCAN(
            metric="precomputed",
            min_cluster_size=clients // 2 + 1,
            min_samples=2,
            allow_single_cluster=True,
            copy=True,
        ).fit_predict(distance)
        assert (found == (labels == 0)).all()
        assert found.sum() > clients / 2


def test_attackers_in_another_direction_are_left_out() -> None:
    assert not largest_cluster(cosine_distances(models(0, 9, 3)))[:3].any()
    assert largest_cluster(np.zeros((5, 5))).all()
    assert largest_cluster(np.zeros((1, 1))).all()


def test_a_step_against_a_plain_version() -> None:
    rows = models(1, 7, 2)
    found, metrics = step(rows, noise=0.0)
    start = np.arange(8.0)
    rows = rows.astype(np.float32).astype(np.float64)
    lengths = [float(np.linalg.norm(row - start)) for row in rows]
    median = sorted(lengths)[3]
    kept = [
        start + (row - start) * min(1.0, median / length)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True))
        if i not in metrics["left_out"]
    ]
    assert {0, 1} <= set(metrics["left_out"])
    np.testing.assert_allclose(found, np.mean(kept, axis=0), rtol=1e-5)


def test_the_noise_has_the_asked_size_and_is_keyed() -> None:
    rows = models(1, 7, 2)
    plain, noisy = step(rows, noise=0.0)[0], step(rows, noise=0.5)[0]
    middle = np.median([np.linalg.norm(row - np.arange(8.0)) for row in rows])
    ratio = np.std(noisy - plain) / (0.5 * middle)
    assert 0.4 < ratio < 2.0
    assert (noisy == step(rows, noise=0.5)[0]).all()
