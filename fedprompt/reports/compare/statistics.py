"""Mean and deviation over seeds, and tests that pair the seeds of two rows.

Runs of the same seed share random draws, such as the partition, so a paired test is not blurred by
the differences between seeds.

Source of the correction: S. Holm, A simple sequentially rejective multiple test procedure,
Scandinavian Journal of Statistics 6, 1979.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedprompt.statistics import sample_std

Test = Literal["t", "wilcoxon", "none"]
LEVEL = 0.05


@dataclass(frozen=True)
class Cell:
    """One row's values of one metric.

    Attributes:
        by_seed: The value of each seed.
        best: Whether the row has the best mean, or shares it.
        p: Holm-corrected p-value of the difference from the best row; None for the best row itself
            and where the difference cannot be tested.
    """

    by_seed: Mapping[int, float]
    best: bool = False
    p: float | None = None

    @property
    def mean(self) -> float | None:
        """Mean over seeds, None without values."""
        return float(np.mean(list(self.by_seed.values()))) if self.by_seed else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for fewer than two."""
        return sample_std(list(self.by_seed.values()))

    @property
    def differs(self) -> bool:
        """Whether the row differs from the best one at the level of 0.05."""
        return self.p is not None and self.p < LEVEL


def column(
    values: Sequence[Mapping[int, float]], *, higher_is_better: bool | None, test: Test
) -> list[Cell]:
    """Compute the cells of one metric.

    Args:
        values: For each row, its values by seed.
        higher_is_better: The direction; None if there is none, and then no row is the best.
        test: The test of every row against the best one.

    Returns:
        One cell per row. If fewer than two rows have values, no row is the best.
    """
    means = [float(np.mean(list(v.values()))) if v else math.nan for v in values]
    known = [m for m in means if math.isfinite(m)]
    if higher_is_better is None or len(known) < 2:
        return [Cell(v) for v in values]
    top = max(known) if higher_is_better else min(known)
    # Equal values summed in another order may differ in their last bits; such rows share the best
    # mean.
    best = [math.isclose(m, top, rel_tol=1e-12) for m in means]
    winner = values[best.index(True)]
    raw = [None if best[i] else paired_p(winner, v, test) for i, v in enumerate(values)]
    return [Cell(v, is_best, p) for v, is_best, p in zip(values, best, holm(raw), strict=True)]


def paired_p(a: Mapping[int, float], b: Mapping[int, float], test: Test) -> float | None:
    """Compute the two-sided p-value of the hypothesis that two rows are equal, paired over seeds.

    Args:
        a: One row's values by seed.
        b: The other row's values; seeds that only one row has are ignored.
        test: The test to use.

    Returns:
        The p-value, not corrected. None if there are fewer than two common seeds, or if all
        differences are the same non-zero number, whose spread of zero says nothing.
    """
    seeds = sorted(set(a) & set(b))
    if test == "none" or len(seeds) < 2:
        return None
    difference = np.array([a[s] - b[s] for s in seeds])
    scale = np.abs(difference).max()
    # Equal in every seed: both tests would divide zero by zero.
    if scale == 0:
        return 1.0
    if np.ptp(difference) <= 1e-9 * scale:
        return None
    # SciPy takes long to import, and a table over one seed needs no test.
    from scipy import stats

    if test == "t":
        return float(stats.ttest_1samp(difference, 0.0).pvalue)
    return float(stats.wilcoxon(difference).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct p-values for the number of tests by Holm's step-down procedure.

    Args:
        p_values: Uncorrected p-values; None stands for a test that was not made.

    Returns:
        Corrected p-values in the same order, at most 1; None where the input is None.
    """
    order = sorted(
        (i for i, p in enumerate(p_values) if p is not None), key=lambda i: p_values[i] or 0.0
    )
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        p = p_values[i]
        assert p is not None
        # The k-th smallest of m p-values is multiplied by m - k + 1, and none may be less than the
        # one before.
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        corrected[i] = highest
    return corrected
