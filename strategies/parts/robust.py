"""What the robust strategies have in common: an expected share of attackers, and mixing.

Source of mixing: Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity (Allouah
et al., AISTATS 2023, arXiv 2302.01772), algorithm 2, nearest neighbour mixing: before anything
else, every update is replaced by the mean of its n - f nearest ones, itself included. This brings
the honest updates of very different clients close to one another; without it, coordinate-wise
strategies shrink them towards zero, and Krum follows a single client.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from fedprompt.config.fields import option
from fedprompt.federation.screening import Update
from fedprompt.federation.strategy import SharedPromptStrategy, StrategyConfig
from fedprompt.messages import Arrays

from .vectors import Rows, changes, count_of, distances, moved


@dataclass(frozen=True)
class RobustConfig(StrategyConfig):
    """How many attackers are expected, and whether updates are mixed."""

    attackers: float = option(0.3, "share of attackers to withstand", ge=0, lt=0.5)
    mix: bool = option(False, "nearest neighbour mixing of the updates first (Allouah et al. 2023)")


class RobustStrategy(SharedPromptStrategy):
    """One step from the clients' changes, all with the same weight, whatever clients claim."""

    config: RobustConfig

    @property
    def weights_by_examples(self) -> bool:
        """Never: a client's claim has no weight here."""
        return False

    @abstractmethod
    def robust_step(self, rows_UP: Rows, attackers: int) -> Rows:
        """The step of the shared tensors.

        Args:
            rows_UP: the clients' changes, mixed if that is configured.
            attackers: number of rows that may come from attackers, less than half of them.

        Returns:
            What is added to the shared tensors, (P,).
        """

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """Mix the changes if that is configured, then take the robust step."""
        # Recomputed in every round, because the number of replies varies.
        attackers = count_of(self.config.attackers, len(updates))
        rows_UP = changes(shared, updates)
        if self.config.mix:
            rows_UP = mixed(rows_UP, attackers)
        return moved(shared, self.robust_step(rows_UP, attackers))


def mixed(rows_UP: Rows, attackers: int) -> Rows:
    """Every row replaced by the mean of its U - attackers nearest rows, itself included."""
    order_UU = np.argsort(distances(rows_UP), axis=1, kind="stable")
    # Sorted, so that equal neighbourhoods have equal means, bit for bit.
    nearest_UN = np.sort(order_UU[:, : len(rows_UP) - attackers], axis=1)
    return np.stack([rows_UP[near].mean(axis=0) for near in nearest_UN])
