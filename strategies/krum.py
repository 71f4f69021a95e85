"""Krum: the one update that lies closest to most others.

Source: Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent (Blanchard et al.,
NeurIPS 2017): of n updates, f of them attackers', the score of one is the sum of its squared
distances to its n - f - 2 nearest others; the lowest score wins. n >= 2 f + 3.

How we differ from Flower's Krum: distances are between changes and in float64 (between whole
prompts in float32, most of their digits cancel), a tie goes to the lowest client id, and f falls to
what the round's replies allow. Mixing, if asked for, is in `robust`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedprompt.config.fields import option

from .parts.robust import RobustConfig, RobustStrategy
from .parts.vectors import Rows, distances


@dataclass(frozen=True)
class KrumConfig(RobustConfig):
    """No hyper-parameters of its own."""

    name: str = option("krum", "strategy name")


class Krum(RobustStrategy):
    """The shared tensors of the client with the lowest score."""

    name = "krum"
    Config = KrumConfig

    def rule(self, rows_UP: Rows, attackers: int) -> Rows:
        """The mean change of the chosen clients; here one of them."""
        fewer = max(0, min(attackers, (len(rows_UP) - 3) // 2))
        chosen = np.argsort(scores(rows_UP, fewer), kind="stable")
        return np.asarray(rows_UP[np.sort(chosen[: self.kept(len(rows_UP), attackers)])].mean(0))

    def kept(self, clients: int, attackers: int) -> int:
        """How many of the clients with the lowest scores count."""
        return 1


def scores(rows_UP: Rows, attackers: int) -> Rows:
    """Krum's score of every row: (U,)."""
    nearest = min(max(1, len(rows_UP) - attackers - 2), len(rows_UP) - 1)
    ordered_UU = np.sort(distances(rows_UP), axis=1)
    # The nearest of all is the row itself, at distance 0.
    return np.asarray(ordered_UU[:, 1 : nearest + 1].sum(axis=1))
