"""FedAdam: Adam on the server.

Source: Adaptive Federated Optimization (Reddi et al., ICLR 2021, arXiv 2003.00295), algorithm 2:
v <- beta_2 v + (1 - beta_2) Delta^2. The rest, and how we differ, is in
`parts/fedopt.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedprompt.config.fields import option

from .parts.fedopt import FedOpt, FedOptConfig
from .parts.vectors import Rows


@dataclass(frozen=True)
class FedAdamConfig(FedOptConfig):
    """As `FedOptConfig`."""

    name: str = option("fedadam", "strategy name")


class FedAdam(FedOpt):
    """The second moment decays towards the last squared change at a fixed rate."""

    name = "fedadam"
    Config = FedAdamConfig
    linear_in_updates = True

    def second_moment(self, last_P: Rows, square_P: Rows) -> Rows:
        """`beta_2 v + (1 - beta_2) Delta^2`."""
        return self.config.beta_2 * last_P + (1 - self.config.beta_2) * square_P
