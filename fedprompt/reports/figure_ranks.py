"""The description of a critical-difference diagram.

Source: J. Demšar, Statistical comparisons of classifiers over multiple data sets, Journal of
Machine Learning Research 7, 2006, figure 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class CriticalDifference:
    """Average ranks on an axis, and bars over those that do not differ (Demšar 2006).

    Attributes:
        names: What is ranked, M names, the best first.
        ranks: M average ranks in ascending order, between 1 and M.
        difference: The distance from which on two ranks differ.
        groups: The first and the last index of each group without differences.
    """

    kind: ClassVar[str] = "ranks"

    names: Sequence[str]
    ranks: Sequence[float]
    difference: float
    groups: Sequence[tuple[int, int]] = ()
