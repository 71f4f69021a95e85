"""Server momentum and adaptive server optimisers, by hand."""

from __future__ import annotations

import math

import numpy as np

from tests.support.strategies import (
    make_strategy,
    random_rows,
    step,
)


def test_fedavgm_by_hand() -> None:
    strategy = make_strategy("fedavgm", (1,), momentum=0.5, lr=2.0)
    # Changes 3 (mean of 1 and 4, weights 1 and 2), then 1: v = 3, then 0.5 * 3 + 1 = 2.5.
    assert step(strategy, [[1.0], [4.0]], images=[1, 2]).tolist() == [6.0]
    assert step(strategy, [[7.0], [7.0]], start=[6.0]).tolist() == [11.0]


def test_fedavgm_without_momentum_is_fedavg() -> None:
    rows, images = random_rows(), list(range(1, 11))
    ours = step(make_strategy("fedavgm", (6,), momentum=0.0), rows, images=images)
    np.testing.assert_allclose(
        ours, step(make_strategy("fedavg", (6,)), rows, images=images), rtol=1e-6
    )


def test_fedadam_by_hand() -> None:
    strategy = make_strategy("fedadam", (1,), lr=0.1, beta_1=0.9, beta_2=0.99, tau=0.01)
    mean, square, x = 0.0, 0.01**2, 0.0
    for change in (2.0, -1.0, 0.5):
        mean, square = 0.9 * mean + 0.1 * change, 0.99 * square + 0.01 * change**2
        expected = x + 0.1 * mean / (math.sqrt(square) + 0.01)
        new = step(strategy, [[x + change]], start=[x])
        np.testing.assert_allclose(new, [expected], rtol=1e-5)
        x = float(new[0])


def test_fedyogi_by_hand() -> None:
    strategy = make_strategy("fedyogi", (1,), lr=0.1, beta_1=0.9, beta_2=0.99, tau=0.01)
    mean, square, x = 0.0, 0.01**2, 0.0
    for change in (2.0, -1.0, 0.01):
        mean = 0.9 * mean + 0.1 * change
        square -= 0.01 * change**2 * math.copysign(1, square - change**2)
        expected = x + 0.1 * mean / (math.sqrt(square) + 0.01)
        new = step(strategy, [[x + change]], start=[x])
        np.testing.assert_allclose(new, [expected], rtol=1e-5)
        x = float(new[0])
    assert square < 0.0001 + 0.01 * 5, "the last, small change has lowered it"
