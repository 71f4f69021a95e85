"""Trimmed mean: coordinate by coordinate, without the largest and the smallest values.

Source: Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates (Yin et al., ICML
2018, arXiv 1803.01498), definition 2: of n values the floor(beta n) largest and smallest are left
out, with beta at least the share of attackers (`attackers` here).

How we differ from Flower's FedTrimmedAvg: its `int(beta * n)` leaves out one value fewer where the
product falls just below a whole number; sums run in float64. Mixing, if configured, is in
`parts/robust.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedprompt.config.fields import option

from .parts.robust import RobustConfig, RobustStrategy
from .parts.vectors import Rows


@dataclass(frozen=True)
class TrimmedMeanConfig(RobustConfig):
    """`attackers` 0 is the plain mean of clients."""

    name: str = option("trimmed_mean", "strategy name")


class TrimmedMean(RobustStrategy):
    """Mean of the middle values of every number of the prompts."""

    name = "trimmed_mean"
    Config = TrimmedMeanConfig

    def robust_step(self, rows_UP: Rows, attackers: int) -> Rows:
        """The mean without `attackers` values at either end."""
        # Sorted coordinate by coordinate: the outermost values of a coordinate may be any client's.
        ordered_UP = np.sort(rows_UP, axis=0)
        return np.asarray(ordered_UP[attackers : len(rows_UP) - attackers].mean(axis=0))
