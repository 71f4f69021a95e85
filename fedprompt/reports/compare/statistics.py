"""Mean and deviation over seeds, and tests that pair the seeds of two rows.

Source of the correction: S. Holm, A simple sequentially rejective multiple test procedure,
Scandinavian Journal of Statistics 6, 1979.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Test = Literal["t", "wilcoxon", "none"]
LEVEL = 0.05


@dataclass(frozen=True)
class Cell:
    """One row's values of one metric.

    `std` divides by n. `p` is the Holm-corrected chance of such a difference from the best row;
    None for that row, and where it cannot be tested.
    """

    by_seed: Mapping[int, float]
    best: bool = False
    p: float | None = None

    @property
    def mean(self) -> float | None:
        """Mean over seeds; None without values."""
        return float(np.mean(list(self.by_seed.values()))) if self.by_seed else None

    @property
    def std(self) -> float | None:
        """Standard deviation over seeds; None without values."""
        return float(np.std(list(self.by_seed.values()))) if self.by_seed else None

    @property
    def differs(self) -> bool:
        """Whether it differs from the best row at the level of 0.05."""
        return self.p is not None and self.p < LEVEL


def column(
    values: Sequence[Mapping[int, float]], *, higher_is_better: bool | None, test: Test
) -> list[Cell]:
    """The cells of one metric, a mapping from seed to value for each row.

    Without a direction, and where fewer than two rows have values, no row is the best.
    """
    means = [float(np.mean(list(v.values()))) if v else math.nan for v in values]
    known = [m for m in means if math.isfinite(m)]
    if higher_is_better is None or len(known) < 2:
        return [Cell(v) for v in values]
    top = max(known) if higher_is_better else min(known)
    best = [math.isclose(m, top, rel_tol=1e-12) for m in means]
    winner = values[best.index(True)]
    raw = [None if best[i] else paired_p(winner, v, test) for i, v in enumerate(values)]
    return [Cell(v, is_best, p) for v, is_best, p in zip(values, best, holm(raw), strict=True)]


def paired_p(a: Mapping[int, float], b: Mapping[int, float], test: Test) -> float | None:
    """Two-sided p of equal values, paired over the seeds that both have.

    None where there are fewer than two such seeds, or where all differences are the same number,
    not zero, so that their spread says nothing.
    """
    seeds = sorted(set(a) & set(b))
    if test == "none" or len(seeds) < 2:
        return None
    difference = np.array([a[s] - b[s] for s in seeds])
    scale = np.abs(difference).max()
    if scale == 0:
        return 1.0
    if np.ptp(difference) <= 1e-9 * scale:
        return None
    from scipy import stats

    if test == "t":
        return float(stats.ttest_1samp(difference, 0.0).pvalue)
    return float(stats.wilcoxon(difference).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for their number, those that are None left out; at most 1."""
    order = sorted(
        (i for i, p in enumerate(p_values) if p is not None), key=lambda i: p_values[i] or 0.0
    )
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        p = p_values[i]
        assert p is not None
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        corrected[i] = highest
    return corrected
