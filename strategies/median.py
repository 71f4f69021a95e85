"""Coordinate median of the shared tensors.

Source: Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates (Yin et al., ICML
2018, arXiv 1803.01498), definition 1; of an even number the two middle values are averaged.

How we differ from Flower's FedMedian: replies are screened before, so a NaN does not spread.
Mixing, if configured, is in `parts/robust.py`; `attackers` has no effect without it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedprompt.config.fields import option

from .parts.robust import RobustConfig, RobustStrategy
from .parts.vectors import Rows


@dataclass(frozen=True)
class MedianConfig(RobustConfig):
    """The options of all robust strategies, and no others."""

    name: str = option("median", "strategy name")


class Median(RobustStrategy):
    """The middle value of every number of the prompts."""

    name = "median"
    Config = MedianConfig

    def robust_step(self, rows_UP: Rows, attackers: int) -> Rows:
        """The median of the changes."""
        return np.asarray(np.median(rows_UP, axis=0))
