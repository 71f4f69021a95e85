"""FedAvg: the sample-weighted mean of the shared tensors.

Source: Communication-Efficient Learning of Deep Networks from Decentralized Data (McMahan et al.,
AISTATS 2017, arXiv 1602.05629), algorithm 1: w <- sum_k (n_k / n) w_k.

How we differ from Flower's FedAvg: sums run in float64 over replies sorted by client id, so the
result does not depend on which client replies first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedprompt.config.fields import option
from fedprompt.federation.screening import Update
from fedprompt.federation.strategy import SharedPromptStrategy, StrategyConfig
from fedprompt.messages import Arrays


@dataclass(frozen=True)
class FedAvgConfig(StrategyConfig):
    """How clients are weighted."""

    weights: Literal["samples", "uniform"] = option(
        "samples", "clients count by their training images, or all the same"
    )


class FedAvg(SharedPromptStrategy):
    """`shared <- sum_k (n_k / n) shared_k`, n_k the number of training images."""

    name = "fedavg"
    Config = FedAvgConfig
    linear_in_updates = True

    @property
    def weights_by_examples(self) -> bool:
        """Whether `weights` is `samples`."""
        return bool(self.config.weights == "samples")

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """The weighted mean, float32."""
        return weighted_mean(shared, updates, self.weights(updates))

    def weights(self, updates: Sequence[Update]) -> list[int]:
        """What each update counts, relative to the others."""
        return [u.num_examples if self.weights_by_examples else 1 for u in updates]


def weighted_mean(shared: Arrays, updates: Sequence[Update], weights: Sequence[float]) -> Arrays:
    """The means of `exact_means`, float32."""
    means = exact_means(shared, updates, weights)
    return {name: mean.astype(np.float32) for name, mean in means.items()}


def exact_means(shared: Arrays, updates: Sequence[Update], weights: Sequence[float]) -> Arrays:
    """Weighted means of the updates' tensors.

    Args:
        shared: the last shared tensors; only their names and shapes are used.
        updates: summed in this order, in float64.
        weights: one weight per update; their sum is positive.

    Returns:
        The means, float64.
    """
    total = float(sum(weights))
    means: Arrays = {}
    for name, last in shared.items():
        sums = np.zeros(last.shape, dtype=np.float64)
        for update, weight in zip(updates, weights, strict=True):
            # w <- sum_k (n_k / n) w_k, algorithm 1. In float64, because float32 sums over a
            # thousand clients lose digits.
            sums += update.arrays[name].astype(np.float64) * (weight / total)
        means[name] = sums
    return means
