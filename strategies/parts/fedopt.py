"""What the adaptive server optimisers (FedAdam, FedYogi) have in common.

Source: Adaptive Federated Optimization (Reddi et al., ICLR 2021, arXiv 2003.00295), algorithm 2: m
<- beta_1 m + (1 - beta_1) Delta, v as each optimiser defines it, w <- w + eta m / (sqrt(v) + tau),
with Delta the sample-weighted mean change (as in the paper's experiments), m_0 = 0 and v_0 = tau^2.

How we differ from Flower: Flower starts at v = 0, and its FedAdam corrects the bias of both moments
with the exponent `server_round + 1`; neither the paper nor we correct it. Both moments are part of
the checkpoint, so a resumed run continues bit for bit.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from fedprompt.config.fields import option
from fedprompt.federation.screening import Update
from fedprompt.federation.strategy import SharedPromptStrategy, StrategyConfig
from fedprompt.messages import Arrays

from .vectors import Rows, changes, combined, moved, sample_shares


@dataclass(frozen=True)
class FedOptConfig(StrategyConfig):
    """beta_1, beta_2 and tau of the paper; `lr` is in units of the prompts' numbers per round."""

    lr: float = option(0.01, "server learning rate eta", gt=0)
    beta_1: float = option(0.9, "decay of the mean change", ge=0, lt=1)
    beta_2: float = option(0.99, "decay of the mean squared change", ge=0, lt=1)
    tau: float = option(1e-3, "adaptivity; large = plain momentum", gt=0)


class FedOpt(SharedPromptStrategy):
    """A server step of `lr m / (sqrt(v) + tau)`."""

    config: FedOptConfig

    @abstractmethod
    def second_moment(self, last_P: Rows, square_P: Rows) -> Rows:
        """The new second moment.

        Args:
            last_P: the last second moment v.
            square_P: the squared mean change Delta^2.

        Returns:
            The new v, (P,).
        """

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """One adaptive step."""
        config = self.config
        change_P = combined(sample_shares(updates), changes(shared, updates))
        # m_0 = 0 and v_0 = tau^2, as in the paper.
        mean_P, square_P = self._moments or (
            np.zeros_like(change_P),
            np.full_like(change_P, config.tau**2),
        )
        # m <- beta_1 m + (1 - beta_1) Delta.
        mean_P = config.beta_1 * mean_P + (1 - config.beta_1) * change_P
        square_P = self.second_moment(square_P, change_P**2)
        self._moments = mean_P, square_P
        # w <- w + eta m / (sqrt(v) + tau).
        return moved(shared, config.lr * mean_P / (np.sqrt(square_P) + config.tau))

    _moments: tuple[Rows, Rows] | None = None

    def state(self) -> Arrays:
        """Both moments, after the first round."""
        return {} if self._moments is None else dict(zip(("m", "v"), self._moments, strict=True))

    def load_state(self, state: Arrays) -> None:
        """Restore what `state` has returned."""
        self._moments = (state["m"], state["v"]) if state else None
