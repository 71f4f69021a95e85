"""SCAFFOLD's server: the mean step of the shared tensors, and of the control variates.

Source: SCAFFOLD: Stochastic Controlled Averaging for Federated Learning (Karimireddy et al., ICML
2020, arXiv 1910.06378), algorithm 1, for participants P of N clients that can train:

    x <- x + lr * mean_P(x_k - x)          c <- c + |P| / N * mean_P(dc_k)

Shared tensors called `control.<name>` hold c, and in a reply the client's difference dc_k. The
paper's means are uniform; `weights: samples` weights x_k, but never dc_k, by training images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedprompt.config.fields import option
from fedprompt.federation.screening import Update
from fedprompt.messages import Arrays

from .fedavg import FedAvg, FedAvgConfig, weighted_mean

CONTROL = "control."
"""Prefix of the names of control variates."""


@dataclass(frozen=True)
class ScaffoldConfig(FedAvgConfig):
    """The server's learning rate."""

    name: str = option("scaffold", "strategy name")
    weights: Literal["samples", "uniform"] = option(
        "uniform", "clients count by their training images, or all the same"
    )
    lr: float = option(1.0, "server learning rate", gt=0)


class Scaffold(FedAvg):
    """FedAvg with a server learning rate, and the sum of the control variates' differences."""

    name = "scaffold"
    Config = ScaffoldConfig

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """New prompts and new control variates, float32."""
        controls = {n: t for n, t in shared.items() if n.startswith(CONTROL)}
        prompts = {n: t for n, t in shared.items() if n not in controls}
        mean = super().aggregate(server_round, prompts, updates)
        # dc_k is averaged uniformly, as in algorithm 1, whatever the weights of x_k are.
        difference = weighted_mean(controls, updates, [1] * len(updates))
        # |P| / N, at most 1.
        share = len(updates) / max(len(self.known.trainable), len(updates))
        return {
            **{
                n: _step(t, mean[n] - t.astype(np.float64), self.config.lr)
                for n, t in prompts.items()
            },
            **{n: _step(t, difference[n], share) for n, t in controls.items()},
        }


def _step(last: NDArray[Any], by: NDArray[Any], times: float) -> NDArray[np.float32]:
    """`last + times * by` in float64, rounded to float32."""
    return (last.astype(np.float64) + times * by).astype(np.float32)
