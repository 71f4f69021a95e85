"""Krum: the one update that lies closest to most others.

Source: Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent (Blanchard et al.,
NeurIPS 2017): of n updates, f of them attackers', the score of one is the sum of its squared
distances to its n - f - 2 nearest others; the lowest score wins. n >= 2 f + 3.

How we differ from Flower's Krum: distances are between changes and in float64 (between whole
prompts in float32, most of their digits cancel), a tie goes to the lowest client id, and f falls to
what the round's replies allow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedprompt.options import option
from strategies.base import SharedPromptStrategy, StrategyConfig
from strategies.screening import Arrays, Update
from strategies.vectors import Rows, changes, count_of, moved


@dataclass(frozen=True)
class KrumConfig(StrategyConfig):
    """How many attackers are expected."""

    name: str = option("krum", "strategy name")
    attackers: float = option(0.3, "share of attackers to withstand", ge=0, lt=0.5)


class Krum(SharedPromptStrategy):
    """The shared tensors of the client with the lowest score."""

    name = "krum"
    Config = KrumConfig
    config: KrumConfig

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """The mean change of the chosen clients; here one of them."""
        rows_UP = changes(shared, updates)
        attackers = min(count_of(self.config.attackers, len(updates)), (len(updates) - 3) // 2)
        chosen = np.argsort(scores(rows_UP, max(attackers, 0)), kind="stable")
        return moved(shared, rows_UP[np.sort(chosen[: self.kept(len(updates))])].mean(axis=0))

    def kept(self, clients: int) -> int:
        """How many of the clients with the lowest scores count."""
        return 1


def scores(rows_UP: Rows, attackers: int) -> NDArray[np.float64]:
    """Krum's score of every row: (U,)."""
    squares_U = (rows_UP**2).sum(axis=1)
    distance_UU = squares_U[:, None] + squares_U[None, :] - 2 * rows_UP @ rows_UP.T
    np.fill_diagonal(distance_UU, np.inf)
    nearest = min(max(1, len(rows_UP) - attackers - 2), len(rows_UP) - 1)
    ordered_UU = np.sort(np.maximum(distance_UU, 0), axis=1)
    return np.asarray(ordered_UU[:, :nearest].sum(axis=1))
