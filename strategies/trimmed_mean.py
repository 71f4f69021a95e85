"""Trimmed mean: coordinate by coordinate, without the largest and the smallest values.

Source: Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates (Yin et al., ICML
2018, arXiv 1803.01498), definition 2: of n values the floor(beta n) largest and smallest are left
out; beta is at least the share of attackers. Clients count alike, whatever they say they hold.

How we differ from Flower's FedTrimmedAvg: its `int(beta * n)` leaves out one value fewer where the
product falls just below a whole number; sums run in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedprompt.options import option
from strategies.base import SharedPromptStrategy, StrategyConfig
from strategies.screening import Arrays, Update
from strategies.vectors import changes, count_of, moved


@dataclass(frozen=True)
class TrimmedMeanConfig(StrategyConfig):
    """`trim` 0 is the plain mean of clients."""

    name: str = option("trimmed_mean", "strategy name")
    trim: float = option(0.3, "share left out at either end; at least that of attackers",
                         ge=0, lt=0.5)  # fmt: skip


class TrimmedMean(SharedPromptStrategy):
    """Mean of the middle values of every number of the prompts."""

    name = "trimmed_mean"
    Config = TrimmedMeanConfig
    config: TrimmedMeanConfig

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """The trimmed mean of the changes."""
        cut, clients = count_of(self.config.trim, len(updates)), len(updates)
        ordered_UP = np.sort(changes(shared, updates), axis=0)
        return moved(shared, ordered_UP[cut : clients - cut].mean(axis=0))
