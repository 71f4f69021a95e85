"""A growth law: how a cost grows with a size, as the exponent of a power that is fitted to points.

The benchmark of scale reports one per cost. An exponent of 0 is a constant cost, 1 a linear and 2 a
quadratic one; what is constant at the beginning and linear later lies in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Law:
    """cost ~ size ^ exponent.

    Attributes:
        exponent: the slope of the line through the logarithms.
        residual: the root mean square of what the points deviate from the line, as a fraction of
            the cost: 0.1 means that the line misses them by 10 % on average.
        points: number of points.
    """

    exponent: float
    residual: float
    points: int


def fit(sizes: Sequence[float], costs: Sequence[float]) -> Law | None:
    """Fit a line through the logarithms by least squares.

    Args:
        sizes: at least two different ones, all positive.
        costs: one per size.

    Returns:
        The law, or None where a cost is not positive and has no logarithm.
    """
    if min(costs) <= 0:
        return None
    x, y = np.log(np.array(sizes, dtype=np.float64)), np.log(np.array(costs, dtype=np.float64))
    slope, offset = np.polyfit(x, y, 1)
    miss = float(np.sqrt(np.mean((y - slope * x - offset) ** 2)))
    return Law(float(slope), math.expm1(miss), len(sizes))
