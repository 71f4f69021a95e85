"""Norm clipping: no client may change the shared tensors by more than a bound.

Source: Can You Really Backdoor Federated Learning? (Sun et al., 2019, arXiv 1911.07963), section 4:
w <- w + mean_k Delta_k / max(1, |Delta_k| / M), the norm over all shared tensors together.

How we differ: without a bound M, the median norm of the round's changes is used, which fewer than
half of the clients cannot raise at will.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedprompt.config.fields import option
from fedprompt.federation.screening import Update
from fedprompt.federation.strategy import SharedPromptStrategy, StrategyConfig
from fedprompt.messages import Arrays

from .parts.vectors import changes, clipped, combined, moved, norms, sample_shares


@dataclass(frozen=True)
class NormClippingConfig(StrategyConfig):
    """A large bound with weights `samples` is FedAvg."""

    name: str = option("norm_clipping", "strategy name")
    bound: float | None = option(None, "largest L2 norm M of a change; null = the median", gt=0)
    weights: Literal["uniform", "samples"] = option(
        "uniform", "samples = by images, which a client may lie about"
    )


class NormClipping(SharedPromptStrategy):
    """Mean of the clients' clipped changes."""

    name = "norm_clipping"
    Config = NormClippingConfig
    config: NormClippingConfig

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """One step with the mean of the clipped changes."""
        rows_UP, bound = changes(shared, updates), self.config.bound
        if bound is None:
            bound = float(np.median(norms(rows_UP)))
        weights_U = sample_shares(updates)
        if self.config.weights == "uniform":
            weights_U = np.full(len(updates), 1 / len(updates))
        # w <- w + mean_k Delta_k / max(1, |Delta_k| / M), section 4.
        return moved(shared, combined(weights_U, clipped(rows_UP, bound)))
