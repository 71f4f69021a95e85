"""What the robust rules have in common: an expected share of attackers, and mixing.

Mixing source: Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity (Allouah et
al., AISTATS 2023, arXiv 2302.01772), algorithm 2, nearest neighbour mixing: before the rule, every
update is replaced by the mean of its n - f nearest ones, itself among them. Honest updates of very
different clients thereby come close to one another, without which coordinate-wise rules shrink them
towards zero and Krum follows one client.
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
    """What is expected of the attackers, and whether updates are mixed before the rule."""

    attackers: float = option(0.3, "share of attackers to withstand", ge=0, lt=0.5)
    mix: bool = option(False, "nearest neighbour mixing before the rule (Allouah et al. 2023)")


class RobustStrategy(SharedPromptStrategy):
    """One step by a rule on the clients' changes; clients count alike, whatever they claim."""

    config: RobustConfig

    @abstractmethod
    def rule(self, rows_UP: Rows, attackers: int) -> Rows:
        """The step (P,) that follows from the clients' changes, some of them attackers'."""

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """Mix where that is asked for, then the rule."""
        attackers = count_of(self.config.attackers, len(updates))
        rows_UP = changes(shared, updates)
        if self.config.mix:
            rows_UP = mixed(rows_UP, attackers)
        return moved(shared, self.rule(rows_UP, attackers))


def mixed(rows_UP: Rows, attackers: int) -> Rows:
    """Every row replaced by the mean of its U - attackers nearest ones, itself among them."""
    order_UU = np.argsort(distances(rows_UP), axis=1, kind="stable")
    # Sorted, so that equal neighbourhoods have equal means, bit for bit.
    nearest_UN = np.sort(order_UU[:, : len(rows_UP) - attackers], axis=1)
    return np.stack([rows_UP[near].mean(axis=0) for near in nearest_UN])
