"""SCAFFOLD: any prompt method, with control variates against client drift.

Source: SCAFFOLD: Stochastic Controlled Averaging for Federated Learning (Karimireddy, Kale, Mohri,
Reddi, Stich, Suresh, ICML 2020, arXiv 1910.06378), algorithm 1 with option II:

    y <- y - lr * (g_k(y) - c_k + c)                           each local step
    c_k+ = c_k - c + (x - y) / (S * lr)                        after S steps from x
    x <- x + lr_g * mean(y - x)    c <- c + |P| / N * mean(c_k+ - c_k)      over participants P of N

The shared container has a part `control` beside the base's tensors, with one tensor for each
learned tensor. The server sends c in it, and a client returns the difference c_k+ - c_k in it; no
optimiser updates it. The private container holds c_k. Traffic doubles in both directions. Private
prompts of the base are trained as usual. The server's side is the strategy `scaffold`, which this
method requires.

How we differ: the theory is for plain SGD. With momentum m, a step moves by more than lr times its
gradient, and (x - y) / (S lr) can reach 1 / (1 - m) mean gradients. S is therefore replaced by the
sum of the steps' coefficients, sum_{s=1..S} (1 - m^s) / (1 - m), which is S for m = 0, so that c_k
remains a (weighted) mean of the gradients along the way. Weight decay counts as part of the
gradient. With Adam, c_k is a mean of its normalised steps, for which nothing is proved.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, RoundInfo, Task, Tensors
from fedprompt.methods.parts.nested import Parts
from fedprompt.methods.parts.wrapper import BASE, WrappedMethod, WrapperConfig

CONTROL = "control"
"""The part that holds c in the shared container, and c_k in the private one."""


@dataclass(frozen=True)
class ScaffoldConfig(WrapperConfig):
    """SCAFFOLD on the client."""

    default_strategy = MappingProxyType({"name": "scaffold"})
    supported_strategies = frozenset({"scaffold"})
    needs_float64 = True  # the coefficients
    keeps_momentum = False  # `coefficients` counts from a momentum of zero

    def check(self) -> None:
        """Refuse a base whose own strategy would be lost."""
        super().check()
        strategy = self.base_config().default_strategy["name"]
        if strategy != "fedavg":
            raise UserError(
                f"scaffold averages the prompts itself, but method '{self.base}' needs the "
                f"strategy '{strategy}'; choose another method.base."
            )


class Scaffold(WrappedMethod):
    """The base, with gradients that are corrected by c - c_k."""

    name = "scaffold"
    source = "Karimireddy et al., ICML 2020"
    Config = ScaffoldConfig
    term_names = ("control",)

    def __init__(self, config: ScaffoldConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.shared_layout = self.shared_layout.with_part(CONTROL, self.learned, "control.")
        self.private_layout = self.private_layout.with_part(CONTROL, self.learned, "control.")
        # c and c_k are constant within a round; an optimiser would apply weight decay to them.
        self.frozen = self.base.frozen.union(
            (f"shared.{n}" for n in self.shared_layout.flat_names[CONTROL].values()),
            (f"private.{n}" for n in self.private_layout.flat_names[CONTROL].values()),
        )

    def init_shared(self, seed: int) -> Tensors:
        """The base's tensors, and c = 0."""
        shared = self.base.init_shared(seed)
        return self.shared_layout.flatten({BASE: shared, CONTROL: self._zeros(seed)})

    def init_private(self, seed: int, client: int) -> Tensors:
        """The base's tensors, and c_k = 0."""
        private = self.base.init_private(seed, client)
        return self.private_layout.flatten({BASE: private, CONTROL: self._zeros(seed)})

    def _zeros(self, seed: int) -> Tensors:
        shared = self.base.init_shared(seed)
        return {n: torch.zeros_like(shared[n]) for n in self.learned}

    def extra_loss_terms(self, shared: Parts, private: Parts, batch: Batch) -> Tensors:
        """`control` (K,): its value is zero, and its gradient is c - c_k."""
        # <c - c_k, y> has the gradient c - c_k, so the wrapper adds the correction of the local
        # step (algorithm 1) to the base's gradient and needs no optimiser of its own.
        c, c_k = shared[CONTROL], private[CONTROL]
        products = [((c[n] - c_k[n]) * shared[BASE][n]).flatten(1).sum(1) for n in self.learned]
        linear_K = torch.stack(products).sum(0)
        # Subtracting the detached value keeps the term out of the reported loss.
        return {"control": linear_K - linear_K.detach()}

    def end_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Option II: store the new c_k and upload its difference to the old one."""
        # `y` is read before the base's `end_round`, which may change what is uploaded; x is what
        # was received.
        y = self.shared_layout.nest(shared)[BASE]
        received = self.shared_layout.nest(round_info.received)
        x, c = received[BASE], received[CONTROL]
        c_k = self.private_layout.nest(private)[CONTROL]
        coefficients_K = coefficients(round_info.steps_K, round_info.momentum)
        difference = {}
        for n in self.learned:
            # The step size of this tensor, with the base's factor for it.
            lr = round_info.lr * self.base.lr_scale.get(f"shared.{n}", 1.0)
            scale = (lr * coefficients_K).to(y[n]).reshape(-1, *[1] * (y[n].dim() - 1))
            # c_k+ - c_k = (x - y) / (S lr) - c; c_k cancels.
            difference[n] = (x[n] - y[n]) / scale - c[n]
        shared, private = super().end_round(shared, private, round_info)
        s, p = self.shared_layout.nest(shared), self.private_layout.nest(private)
        s[CONTROL] = difference
        p[CONTROL] = {n: c_k[n] + difference[n] for n in self.learned}
        return self.shared_layout.flatten(s), self.private_layout.flatten(p)


def coefficients(steps_K: Tensor, momentum: float) -> Tensor:
    """How much the gradients of S steps count in the sum of all updates: float64 (K,).

    sum_{s=1..S} (1 - m^s) / (1 - m), which is S for m = 0.
    """
    # The closed form of the sum, by the formula for a geometric series.
    steps = steps_K.double()
    geometric = momentum * (1 - momentum**steps) / (1 - momentum)
    return (steps - geometric) / (1 - momentum)
