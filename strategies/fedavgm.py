"""FedAvgM: server momentum on FedAvg's step.

Source: Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification
(Hsu, Qi and Brown, 2019, arXiv 1909.06335): v <- beta v + Delta, w <- w + lr v, Delta the
sample-weighted mean change.

How we differ from Flower's FedAvgM: sums run in float64, and checkpoints hold the velocity.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedprompt.config.fields import option
from fedprompt.federation.screening import Update
from fedprompt.federation.strategy import SharedPromptStrategy, StrategyConfig
from fedprompt.messages import Arrays

from .parts.vectors import Rows, changes, combined, moved, sample_shares


@dataclass(frozen=True)
class FedAvgMConfig(StrategyConfig):
    """Momentum 0.9 as in the paper; lr 1 and momentum 0 are FedAvg."""

    name: str = option("fedavgm", "strategy name")
    momentum: float = option(0.9, "server momentum beta", ge=0, lt=1)
    lr: float = option(1.0, "server learning rate", gt=0)


class FedAvgM(SharedPromptStrategy):
    """`v <- beta v + Delta; shared <- shared + lr v`."""

    name = "fedavgm"
    Config = FedAvgMConfig
    linear_in_updates = True
    config: FedAvgMConfig

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """One server step with momentum."""
        # v <- beta v + Delta, with Delta the sample-weighted mean change.
        velocity_P: Rows = combined(sample_shares(updates), changes(shared, updates))
        if self._velocity is not None:
            velocity_P = self.config.momentum * self._velocity + velocity_P
        self._velocity = velocity_P
        # w <- w + lr v.
        return moved(shared, self.config.lr * velocity_P)

    _velocity: Rows | None = None

    def state(self) -> Arrays:
        """The velocity after the first round."""
        return {} if self._velocity is None else {"velocity": self._velocity}

    def load_state(self, state: Arrays) -> None:
        """Restore what `state` has returned."""
        self._velocity = state.get("velocity")
