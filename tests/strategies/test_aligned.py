"""Aligned: weights that fall with disagreement."""

from __future__ import annotations

import math

import numpy as np

from fedprompt.strategies.aligned import agreement
from tests.support.strategies import (
    make_strategy,
    random_rows,
    step,
)


def test_aligned_without_sharpness_and_trust_region_is_fedavg() -> None:
    rows, images = random_rows(), [7, 1, 50, 3, 9, 2, 80, 4, 5, 6]
    limit = make_strategy("aligned", (6,), sharpness=0.0, trust=None)
    fedavg = step(make_strategy("fedavg", (6,)), rows, images=images)
    np.testing.assert_allclose(step(limit, rows, images=images), fedavg, rtol=1e-6, atol=1e-7)
    nearly = make_strategy("aligned", (6,), sharpness=1e-9, trust=1e9)
    np.testing.assert_allclose(step(nearly, rows, images=images), fedavg, rtol=1e-6, atol=1e-7)
    usual = step(make_strategy("aligned", (6,)), rows, images=images)
    assert np.abs(usual - fedavg).max() > 1e-3, "and elsewhere it is not"


def test_aligned_by_hand() -> None:
    # Consensus (1, 0): the median of (1, 0), (1, 0) and (-1, 0). Agreement 1, 1, -1.
    rows = np.array([[2.0, 0.0], [2.0, 0.0], [-8.0, 0.0]])
    assert agreement(rows).tolist() == [1.0, 1.0, -1.0]
    free = make_strategy("aligned", (2,), sharpness=0.5, trust=None, credit=1.5)
    for lost in (1, 2):
        small = math.exp(-0.5 * lost)
        expected = (2 + 2 - 8 * small) / (2 + small)
        np.testing.assert_allclose(step(free, rows), [expected, 0], rtol=1e-6)
    assert free.scores == {0: 1.5, 1: 1.5, 2: -2.0}, "credit is limited"
    assert free.metrics() == {"below_zero": {"2": -2.0}}
    near = make_strategy("aligned", (2,), sharpness=0.5, trust=1.5)
    small = math.exp(-0.5)
    np.testing.assert_allclose(step(near, rows), [(4 - 3 * small) / (2 + small), 0], rtol=1e-6)


def test_aligned_remembers_after_a_restart() -> None:
    rows = np.array([[2.0, 0.0], [2.0, 0.0], [-8.0, 0.0]])
    strategy, resumed = (
        make_strategy("aligned", (2,), trust=None),
        make_strategy("aligned", (2,), trust=None),
    )
    step(strategy, rows)
    resumed.load_state(strategy.state())
    assert resumed.scores == {0: 1.0, 1: 1.0, 2: -1.0}
    assert (step(resumed, rows) == step(strategy, rows)).all()


def test_aligned_counts_those_who_agree_as_fedavg_does() -> None:
    draw = np.random.default_rng(1)
    rows = 1 + 0.5 * draw.standard_normal((10, 30))
    images = list(range(1, 11))
    fedavg = step(make_strategy("fedavg", (30,)), rows, images=images)
    after = step(make_strategy("aligned", (30,), trust=None), rows, images=images)
    np.testing.assert_allclose(after, fedavg, rtol=1e-6)
