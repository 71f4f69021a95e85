"""The alignment of COTE on histograms whose values can be computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedprompt.evaluation.alignment import alignment, signal


def plain(counts: list[int]) -> float:
    """M with loops, and all powers taken one by one."""
    total, classes = sum(counts), len(counts)
    shares = [n / total for n in counts if n]
    m = len(shares)
    gini = (1 - sum(p * p for p in shares)) / (1 - 1 / classes)
    entropy = sum(-p * math.log(p) for p in shares) / math.log(classes)
    deviation = sum((p - 1 / m) ** 2 for p in shares)
    regularity = max(0.0, 1 - deviation / (1 / m))
    f = m / (m + classes)
    return float(gini ** (1 - f) * entropy ** (1 - f) * regularity**f)


@pytest.mark.parametrize("counts", [[5, 3, 0, 2], [4, 4, 4, 4], [9, 1, 0, 0], [2, 0, 7, 6]])
def test_the_formula(counts: list[int]) -> None:
    assert alignment(np.array(counts)) == pytest.approx(plain(counts))
    ideal = plain([int(n > 0) for n in counts])
    assert signal(np.array(counts), 0.8) == pytest.approx(plain(counts) - 0.8 * ideal)


def test_even_histograms_are_aligned_and_uneven_ones_are_not() -> None:
    """Of an even one M is M_ideal; one class in which nearly all images are has M near 0."""
    assert alignment(np.full(10, 3)) == pytest.approx(1)
    assert signal(np.full(10, 3)) == pytest.approx(0.1)
    assert signal(np.array([97, 1, 1, 1, 0])) < 0
    assert alignment(np.array([97, 1, 1, 1, 0])) == 0, "the regularity is not below 0"
    assert signal(np.array([8, 0, 0])) == 0, "of one class"
