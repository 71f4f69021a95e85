"""Krum: the one update that lies closest to most others.

Source: Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent (Blanchard et al.,
NeurIPS 2017): of n updates, f of them attackers', the score of one is the sum of its squared
distances to its n - f - 2 nearest others; the lowest score wins. n >= 2 f + 3.

How we differ from Flower's Krum: distances are between changes and in float64 (between whole
prompts in float32, most of their digits cancel), a tie goes to the lowest client id, and f falls to
what the round's replies allow. Mixing, if configured, is in `parts/robust.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedprompt.config.fields import option

from .parts.robust import RobustConfig, RobustStrategy
from .parts.vectors import Rows, distances


@dataclass(frozen=True)
class KrumConfig(RobustConfig):
    """The options of all robust strategies, and no others."""

    name: str = option("krum", "strategy name")


class Krum(RobustStrategy):
    """The shared tensors of the client with the lowest score."""

    name = "krum"
    Config = KrumConfig

    def robust_step(self, rows_UP: Rows, attackers: int) -> Rows:
        """The mean change of the clients with the lowest scores; for Krum this is one client."""
        # The scores are defined for n >= 2 f + 3 only.
        withstood = max(0, min(attackers, (len(rows_UP) - 3) // 2))
        # A stable sort over rows by client id: a tie goes to the lowest id.
        order = np.argsort(scores(rows_UP, withstood), kind="stable")
        # Sorted by client, so that equal selections have equal means, bit for bit.
        selected = np.sort(order[: self.num_selected(len(rows_UP), attackers)])
        return np.asarray(rows_UP[selected].mean(0))

    def num_selected(self, clients: int, attackers: int) -> int:
        """How many of the clients with the lowest scores count; `MultiKrum` overrides it."""
        return 1


def scores(rows_UP: Rows, attackers: int) -> Rows:
    """Krum's score of every row.

    Args:
        rows_UP: the clients' changes.
        attackers: number f of attackers to withstand.

    Returns:
        Sums of squared distances to the n - f - 2 nearest others, (U,).
    """
    nearest = min(max(1, len(rows_UP) - attackers - 2), len(rows_UP) - 1)
    ordered_UU = np.sort(distances(rows_UP), axis=1)
    # The nearest of all is the row itself, at distance 0.
    return np.asarray(ordered_UU[:, 1 : nearest + 1].sum(axis=1))
