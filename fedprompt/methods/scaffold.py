"""SCAFFOLD: any prompt method with control variates against client drift.

Source: SCAFFOLD: Stochastic Controlled Averaging for Federated Learning (Karimireddy, Kale, Mohri,
Reddi, Stich, Suresh, ICML 2020, arXiv 1910.06378), algorithm 1 with option II:

    y <- y - lr * (g_k(y) - c_k + c)                           each local step
    c_k+ = c_k - c + (x - y) / (S * lr)                        after S steps from x
    x <- x + lr_g * mean(y - x)    c <- c + |P| / N * mean(c_k+ - c_k)      over participants P of N

The shared container carries a `control.` twin of every learned tensor: downwards it is c, upwards
the difference c_k+ - c_k; no optimiser moves it. c_k is private. Traffic doubles in both
directions. Private prompts of the base are trained as ever. The server's part is the strategy
`scaffold`, which this method needs.

How we differ: the theory is for plain SGD. Under momentum m a step moves by more than lr times its
gradient, and (x - y) / (S lr) is up to 1 / (1 - m) mean gradients. S is therefore replaced by the
sum of the steps' coefficients, sum_{s=1..S} (1 - m^s) / (1 - m), which is S for m = 0, so c_k
stays a (weighted) mean of the gradients on the way. Weight
decay counts as part of the gradient. Under Adam c_k is a mean of its normalised steps, for which
nothing is proved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, RoundInfo, Task, Tensors
from fedprompt.methods.parts.wrapper import WrappedMethod, WrapperConfig


@dataclass(frozen=True)
class ScaffoldConfig(WrapperConfig):
    """SCAFFOLD on the client."""

    name: str = option("scaffold", "method name")


class Scaffold(WrappedMethod):
    """The base, its gradients corrected by c - c_k."""

    name = "scaffold"
    source = "Karimireddy et al., ICML 2020"
    Config = ScaffoldConfig
    strategy = MappingProxyType({"name": "scaffold"})
    works_with = frozenset({"scaffold"})
    prefix = "control."
    term_names = ("control",)

    def __init__(self, config: ScaffoldConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        rule = type(self.base).server_rule(self.base.config)["name"]
        if rule != "fedavg":
            raise UserError(
                f"scaffold averages the prompts itself, but method '{config.base}' needs the "
                f"strategy '{rule}'; choose another method.base."
            )
        names = self.trained(self.base.init_shared(0))
        self.frozen = self.base.frozen | {
            f"{kind}.{self.prefix}{n}" for kind in ("shared", "private") for n in names
        }

    @classmethod
    def server_rule(cls, config: Any) -> Mapping[str, Any]:
        """Its own."""
        return cls.strategy

    def init_shared(self, seed: int) -> Tensors:
        """The base's, and c = 0 beside them."""
        shared = self.base.init_shared(seed)
        return shared | self._zeros(shared)

    def init_private(self, seed: int, client: int) -> Tensors:
        """The base's, and c_k = 0 beside them."""
        return self.base.init_private(seed, client) | self._zeros(self.base.init_shared(seed))

    def _zeros(self, shared: Tensors) -> Tensors:
        return {self.prefix + n: torch.zeros_like(t) for n, t in self.trained(shared).items()}

    def extra_loss_terms(self, shared: Tensors, private: Tensors, batch: Batch) -> Tensors:
        """`control` (K,): zero, with the gradient c - c_k."""
        products = [
            ((shared[self.prefix + n] - private[self.prefix + n]) * t).flatten(1).sum(1)
            for n, t in self.trained(shared).items()
        ]
        linear_K = torch.stack(products).sum(0)
        return {"control": linear_K - linear_K.detach()}

    def end_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Option II: the new c_k is kept, its difference to the old one goes up as `control.`."""
        moves_K = coefficients(round_info.steps_K, round_info.momentum)
        difference, kept = {}, {}
        for n, y in self.trained(shared).items():
            name = self.prefix + n
            lr = round_info.lr * self.base.lr_scale.get(f"shared.{n}", 1.0)
            scale = (lr * moves_K).to(y).reshape(-1, *[1] * (y.dim() - 1))
            difference[name] = (round_info.received[n] - y) / scale - round_info.received[name]
            kept[name] = private[name] + difference[name]
        s, p = super().end_round(shared, private, round_info)
        return s | difference, p | kept


def coefficients(steps_K: Tensor, momentum: float) -> Tensor:
    """How often the gradients of S steps count in their sum, with momentum: float64 (K,).

    sum_{s=1..S} (1 - m^s) / (1 - m); S itself where m = 0.
    """
    steps = steps_K.double()
    geometric = momentum * (1 - momentum**steps) / (1 - momentum)
    return (steps - geometric) / (1 - momentum)
