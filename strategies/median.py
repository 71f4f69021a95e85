"""Coordinate median of the shared tensors.

Source: Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates (Yin et al., ICML
2018, arXiv 1803.01498), definition 1. Clients count alike, whatever they say they hold; of an even
number the two middle values are averaged.

How we differ from Flower's FedMedian: replies are screened before, so a NaN does not spread.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedprompt.options import option
from strategies.base import SharedPromptStrategy, StrategyConfig
from strategies.screening import Arrays, Update
from strategies.vectors import changes, moved


@dataclass(frozen=True)
class MedianConfig(StrategyConfig):
    """No hyper-parameters of its own."""

    name: str = option("median", "strategy name")


class Median(SharedPromptStrategy):
    """The middle value of every number of the prompts."""

    name = "median"
    Config = MedianConfig

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """The median of the changes."""
        return moved(shared, np.asarray(np.median(changes(shared, updates), axis=0)))
