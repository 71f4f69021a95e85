"""FedProx: any prompt method whose shared prompts are held near those received.

Source: Federated Optimization in Heterogeneous Networks (Li, Sahu, Zaheer, Sanjabi, Talwalkar,
Smith, MLSys 2020, arXiv 1812.06127), eq. 2:

    min_w  F_k(w) + mu / 2 * ||w - w_received||^2

`w` are all shared tensors that are trained; private ones are free. The sum of squares is not
divided by its length, so the same `mu` holds longer prompts together more strongly.

How we differ: the paper also allows inexact local solutions (fewer steps on slow clients); here all
clients make their usual steps. The paper searches mu in {0.001, 0.01, 0.1, 1}; 0.5 is the default
that federated prompt-learning code uses for it (FedOTP's `--mu`).
"""

from __future__ import annotations

from dataclasses import dataclass

from fedprompt.config.fields import option
from fedprompt.methods.base import Batch, Tensors
from fedprompt.methods.parts.wrapper import WrappedMethod, WrapperConfig, squared_distance


@dataclass(frozen=True)
class FedProxConfig(WrapperConfig):
    """FedProx's weight."""

    name: str = option("fedprox", "method name")
    mu: float = option(0.5, "weight mu of the proximal term", ge=0)


class FedProx(WrappedMethod):
    """The base with one more term, `prox`."""

    name = "fedprox"
    source = "Li et al., MLSys 2020"
    Config = FedProxConfig
    prefix = "prox."
    term_names = ("prox",)

    def extra_loss_terms(self, shared: Tensors, private: Tensors, batch: Batch) -> Tensors:
        """`prox` (K,): mu / 2 times the squared distance to what was received."""
        distance_K = squared_distance(self.trained(shared), batch.round_info.received)
        return {"prox": self.config.mu / 2 * distance_K}
