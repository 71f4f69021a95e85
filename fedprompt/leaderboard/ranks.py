"""Average ranks of rows over blocks, and which of them differ.

Source: J. Demšar, Statistical comparisons of classifiers over multiple data sets, Journal of
Machine Learning Research 7, 2006: Friedman's test asks whether the rows differ at all, and
Nemenyi's critical difference which pairs of them do. Friedman's statistic is corrected for ties
here, as SciPy computes it; Demšar's formula is not.

Shapes: M rows, B blocks. A block is a situation in which all rows were measured.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.05
"""The level of both tests."""
DIGITS = 12
"""Equal values that were summed in another order differ in their last bits, and are still ties."""


@dataclass(frozen=True)
class Ranks:
    """The comparison of M rows over B blocks.

    Attributes:
        blocks: B.
        averages: M average ranks; 1 is the best, and ties share the mean of their ranks.
        statistic: Friedman's chi-squared; None with fewer than two blocks or three rows.
        p: Its p-value; None if there is no statistic.
        critical_difference: The distance from which on two average ranks differ, by Nemenyi's test;
            None if there is no statistic.
        groups: Indices of rows, in the order of their ranks, among which no two differ. Only
            maximal groups of at least two rows are listed. If Friedman's test finds no difference,
            all rows are one group.
    """

    blocks: int
    averages: tuple[float, ...]
    statistic: float | None = None
    p: float | None = None
    critical_difference: float | None = None
    groups: tuple[tuple[int, ...], ...] = ()

    @property
    def differ(self) -> bool:
        """Whether Friedman's test finds a difference between any two rows."""
        return self.p is not None and self.p < LEVEL


def rank(values_MB: Sequence[Sequence[float]]) -> Ranks:
    """Rank rows in every block, the highest value first, and test the average ranks.

    Args:
        values_MB: For each of at least one row, its values in the blocks.
    """
    # SciPy takes long to import, and most commands need none of it.
    from scipy import stats

    values = np.round(np.asarray(values_MB, dtype=float), DIGITS)
    rows, blocks = values.shape
    averages = stats.rankdata(-values, axis=0).mean(axis=1)
    found = tuple(averages.tolist())
    if rows < 3 or blocks < 2:
        return Ranks(blocks, found)
    # Where all rows are equal in all blocks, the statistic would be zero divided by zero.
    equal = bool((values == values[0]).all())
    statistic, p = (0.0, 1.0) if equal else map(float, stats.friedmanchisquare(*values))
    difference = critical_difference(rows, blocks)
    order = np.argsort(averages, kind="stable").tolist()
    groups = [tuple(order)] if p >= LEVEL else _groups(order, averages, difference)
    return Ranks(blocks, found, statistic, p, difference, tuple(groups))


@functools.cache
def critical_difference(rows: int, blocks: int) -> float:
    """Nemenyi's critical difference of two average ranks at the level of 0.05.

    Args:
        rows: M, at least 2.
        blocks: B, at least 1.
    """
    from scipy import stats

    quantile = float(stats.studentized_range.ppf(1 - LEVEL, rows, math.inf)) / math.sqrt(2)
    return quantile * math.sqrt(rows * (rows + 1) / (6 * blocks))


def _groups(order: Sequence[int], averages: np.ndarray, difference: float) -> list[tuple[int, ...]]:
    """The maximal runs of rows, in the order of their ranks, whose ends do not differ."""
    groups = []
    reached = 0
    for first in range(len(order)):
        last = first
        while last + 1 < len(order) and (
            averages[order[last + 1]] - averages[order[first]] < difference
        ):
            last += 1
        # A run that ends where an earlier one does is a part of it.
        if last > first and last > reached:
            groups.append(tuple(order[first : last + 1]))
        reached = max(reached, last)
    return groups
