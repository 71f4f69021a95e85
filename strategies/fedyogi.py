"""FedYogi: Yogi on the server.

Source: Adaptive Federated Optimization (Reddi et al., ICLR 2021, arXiv 2003.00295), algorithm 2:
v <- v - (1 - beta_2) Delta^2 sign(v - Delta^2). The rest, and how we
differ, is in `parts/fedopt.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedprompt.config.fields import option

from .parts.fedopt import FedOpt, FedOptConfig
from .parts.vectors import Rows


@dataclass(frozen=True)
class FedYogiConfig(FedOptConfig):
    """As `FedOptConfig`."""

    name: str = option("fedyogi", "strategy name")


class FedYogi(FedOpt):
    """The second moment moves by an amount that does not depend on its own size."""

    name = "fedyogi"
    Config = FedYogiConfig
    linear_in_updates = True

    def second_moment(self, last_P: Rows, square_P: Rows) -> Rows:
        """`v - (1 - beta_2) Delta^2 sign(v - Delta^2)`."""
        return last_P - (1 - self.config.beta_2) * square_P * np.sign(last_P - square_P)
