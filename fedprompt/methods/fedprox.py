"""FedProx: any prompt method whose shared prompts stay close to the received ones.

Source: Federated Optimization in Heterogeneous Networks (Li, Sahu, Zaheer, Sanjabi, Talwalkar,
Smith, MLSys 2020, arXiv 1812.06127), eq. 2:

    min_w  F_k(w) + mu / 2 * ||w - w_received||^2

`w` stands for all shared tensors that are trained; private ones are not constrained. The sum of
squares is not divided by the number of entries, so the same `mu` constrains longer prompts more
strongly.

How we differ: the paper also allows inexact local solutions (fewer steps on slow clients); here all
clients make their usual number of steps. The paper searches mu in {0.001, 0.01, 0.1, 1}; 0.5 is the
default of federated prompt-learning code (FedOTP's `--mu`).
"""

from __future__ import annotations

from dataclasses import dataclass

from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.methods.base import Batch, Tensors
from fedprompt.methods.method_config import allows_image_noise, allows_other_image_towers
from fedprompt.methods.parts.nested import Parts
from fedprompt.methods.parts.wrapper import BASE, WrappedMethod, WrapperConfig, squared_distance


@dataclass(frozen=True)
class FedProxConfig(WrapperConfig):
    """FedProx's weight."""

    @property
    def token_space(self) -> bool:
        """The base's declaration."""
        return allows_other_image_towers(self._base())

    @property
    def supports_image_noise(self) -> bool:
        """The base's declaration; the proximal term reads no image."""
        return allows_image_noise(self._base())

    mu: float = option(0.5, "weight mu of the proximal term", ge=0, search=log_range(0.001, 2))


class FedProx(WrappedMethod):
    """The base with one more loss term, `prox`."""

    name = "fedprox"
    source = "Li et al., MLSys 2020"
    Config = FedProxConfig
    term_names = ("prox",)

    def extra_loss_terms(self, shared: Parts, private: Parts, batch: Batch) -> Tensors:
        """`prox` (K,), eq. 2: mu / 2 times the squared distance to the received prompts."""
        # Frozen tensors and extras do not move, so they are left out of the distance.
        learned = {n: shared[BASE][n] for n in self.learned}
        received = self.base_round(batch.round_info).received
        return {"prox": self.config.mu / 2 * squared_distance(learned, received)}
