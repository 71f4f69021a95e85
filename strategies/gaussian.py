"""FedAvg, and a Gaussian-weighted mean of all rounds' prompts, which is evaluated and saved.

Source: Self-regulating Prompts: Foundational Model Adaptation without Forgetting (PromptSRC,
Khattak et al., ICCV 2023, arXiv 2307.06948), Gaussian-weighted prompt aggregation: the final
prompts are sum_e w_e P_e over epochs e, w_e proportional to N(e; mu, sigma^2), sum_e w_e = 1. Here
an epoch is a communication round. Checked against the authors' code (muzairkhattak/PromptSRC).

How we differ: mu and sigma are shares of the run, so that the paper's settings (15 and 1 of 20
epochs; 30 and 30, or 45 and 5, of 50; 6 and 10 of 20) carry over to any number of rounds. The mean
is that of the rounds so far, with their weights divided by their sum, so that it can be evaluated
after every round; after the last round it is the paper's. It never enters training: clients
continue from FedAvg's prompts. A public federated port sends the unfinished sum to the clients
instead; as the first weights are nearly zero, training there restarts near zero every round.

Weights are kept as logarithms: the first of 20 is 1e-43 times the largest, and in longer runs the
first weights would be rounded to zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedprompt.config.fields import option
from fedprompt.federation.screening import Update
from fedprompt.messages import Arrays

from .fedavg import FedAvg, FedAvgConfig

MEAN, LOG_WEIGHT = "mean.", "log_weight"
"""Names in the state: the mean of each shared tensor, the logarithm of the sum of weights."""


@dataclass(frozen=True)
class GaussianConfig(FedAvgConfig):
    """Defaults: PromptSRC's base-to-new setting, mean 15 and standard deviation 1 of 20 epochs."""

    name: str = option("gaussian", "strategy name")
    mean: float = option(0.75, "round of the largest weight, as a share of all rounds", ge=0)
    std: float = option(0.05, "standard deviation of the weights, likewise", gt=0)


class Gaussian(FedAvg):
    """`eval_tensors` is the weighted mean of the shared tensors after every aggregated round."""

    name = "gaussian"
    Config = GaussianConfig
    linear_in_updates = True

    log_weight = -np.inf
    means: Arrays | None = None

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """FedAvg's mean, float32; it is also added to the mean over rounds."""
        new = super().aggregate(server_round, shared, updates)
        self._add(new, self.log_density(server_round))
        return new

    def log_density(self, server_round: int) -> float:
        """Logarithm of a round's weight, up to a constant."""
        mean, std = (share * self.rounds for share in (self.config.mean, self.config.std))
        # The normalising constant of N(e; mu, sigma^2) cancels, because the weights are divided by
        # their sum.
        return float(-0.5 * ((server_round - mean) / std) ** 2)

    def eval_tensors(self, shared: Arrays) -> Arrays:
        """The mean over rounds, float32; before the first round, the shared tensors themselves."""
        if self.means is None:
            return shared
        return {n: mean.astype(np.float32) for n, mean in self.means.items()}

    def state(self) -> Arrays:
        """The mean, float64, and the logarithm of the sum of weights."""
        if self.means is None:
            return {}
        total = np.array([self.log_weight], dtype=np.float64)
        return {LOG_WEIGHT: total} | {MEAN + n: mean for n, mean in self.means.items()}

    def load_state(self, state: Arrays) -> None:
        """Restore what `state` has returned."""
        self.means = {n.removeprefix(MEAN): a for n, a in state.items() if n != LOG_WEIGHT} or None
        self.log_weight = float(state[LOG_WEIGHT][0]) if state else -np.inf

    def _add(self, values: Arrays, log_weight: float) -> None:
        """Add the tensors of a round to the running mean."""
        # The logarithm of the sum of the weights so far; the weights themselves would underflow.
        total = float(np.logaddexp(self.log_weight, log_weight))
        share = np.exp(log_weight - total)
        last = self.means or {n: np.zeros(v.shape) for n, v in values.items()}
        # The running form of sum_e w_e P_e / sum_e w_e, so that no earlier round has to be stored.
        self.means = {n: last[n] + share * (v - last[n]) for n, v in values.items()}
        self.log_weight = total
