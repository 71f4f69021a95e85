"""FedAvg in double precision, for tensors that are sent as a float32 number and its remainder.

Source: algorithm 1 of McMahan et al. (AISTATS 2017), as in `fedavg.py`. How we differ: shared
tensors are float32, and a mean rounded to float32 loses 29 of float64's 52 bits. A method that
solves equations with means needs them: it sends `x` and `x.rest`, what rounding has left of x
(`fedprompt/methods/parts/float_pairs.py`). Here both are averaged in float64 and the mean of their
sum is split again. Tensors without a remainder are averaged as by FedAvg, to the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedprompt.config.fields import option
from fedprompt.federation.screening import Update
from fedprompt.messages import REST, Arrays

from .fedavg import FedAvg, FedAvgConfig, exact_means


@dataclass(frozen=True)
class ExactMeanConfig(FedAvgConfig):
    """The options of FedAvg."""

    name: str = option("exact_mean", "strategy name")


class ExactMean(FedAvg):
    """`x + x.rest <- sum_k (n_k / n) (x_k + x.rest_k)`."""

    name = "exact_mean"
    Config = ExactMeanConfig
    linear_in_updates = True

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """The weighted mean, float32 and its remainder."""
        means = exact_means(shared, updates, self.weights(updates))
        new = {name: mean.astype(np.float32) for name, mean in means.items()}
        for name in new:
            rest = name + REST
            if rest in new:
                whole = means[name] + means[rest]
                new[name] = whole.astype(np.float32)
                new[rest] = (whole - new[name]).astype(np.float32)
        return new
