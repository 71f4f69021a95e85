"""FedAvg: the sample-weighted mean of the shared tensors.

Source: Communication-Efficient Learning of Deep Networks from Decentralized Data (McMahan et al.,
AISTATS 2017, arXiv 1602.05629), algorithm 1: w <- sum_k (n_k / n) w_k.

How we differ from Flower's FedAvg: sums run in float64 over replies sorted by client id, so the
result does not depend on who answers first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from strategies.base import SharedPromptStrategy, StrategyConfig
from strategies.screening import Arrays, Update


@dataclass(frozen=True)
class FedAvgConfig(StrategyConfig):
    """No hyper-parameters of its own."""


class FedAvg(SharedPromptStrategy):
    """`shared <- sum_k (n_k / n) shared_k`, n_k the number of training images."""

    name = "fedavg"
    Config = FedAvgConfig

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """The weighted mean, float32."""
        total = float(sum(u.num_examples for u in updates))
        mean: Arrays = {}
        for name, last in shared.items():
            sums = np.zeros(last.shape, dtype=np.float64)
            for update in updates:
                sums += update.arrays[name].astype(np.float64) * (update.num_examples / total)
            mean[name] = sums.astype(np.float32)
        return mean
