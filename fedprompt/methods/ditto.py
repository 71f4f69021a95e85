"""Ditto: any prompt method beside a personal copy of its prompts, held near the shared ones.

Source: Ditto: Fair and Robust Federated Learning Through Personalization (Li, Hu, Beirami, Smith,
ICML 2021, arXiv 2012.04221), algorithm 1; public code https://github.com/litian96/ditto. With the
shared tensors w and a client's own copy v of them:

    w <- w - lr * grad F_k(w)                                  uploaded and averaged, as ever
    v <- v - lr * (grad F_k(v) + lam * (v - w_received))       stays

Both see the same batches. The client's model is v; the global one is w. Where the base has private
tensors of its own, both models have their own set of them. A copy starts as the shared start.

How we differ: both are moved by the optimiser of training (the paper's steps are plain SGD). The
paper tunes lam per data set (its code lets clients choose among 0.1, 1 and 2 on validation data);
here it is one number, 1, as in the code's example scripts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.methods.base import Batch, ClientData, RoundInfo, Task, Tensors
from fedprompt.methods.parts.wrapper import WrappedMethod, WrapperConfig, add, squared_distance

SHARED, PRIVATE = "ditto.shared.", "ditto.private."
"""Prefixes of the personal model's tensors, all of them private."""


@dataclass(frozen=True)
class DittoConfig(WrapperConfig):
    """Ditto's weight."""

    name: str = option("ditto", "method name")
    lam: float = option(1.0, "weight lambda of the pull towards the shared prompts", ge=0)


class Ditto(WrappedMethod):
    """The base twice: on the shared tensors, and on the client's copy of them."""

    name = "ditto"
    source = "Li et al., ICML 2021"
    Config = DittoConfig
    prefix = "ditto."

    def __init__(self, config: DittoConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.frozen = self.base.frozen | {self._copy_of(n) for n in self.base.frozen}
        self.lr_scale = {
            **self.base.lr_scale,
            **{self._copy_of(n): factor for n, factor in self.base.lr_scale.items()},
        }

    @staticmethod
    def _copy_of(name: str) -> str:
        """`private.ditto.shared.ctx` of `shared.ctx`."""
        return f"private.ditto.{name}"

    @staticmethod
    def _named(shared: Tensors, private: Tensors) -> Tensors:
        """The personal model's tensors under their names in the private container."""
        return {SHARED + n: t for n, t in shared.items()} | {
            PRIVATE + n: t for n, t in private.items()
        }

    def _personal(self, shared: Tensors, private: Tensors) -> tuple[Tensors, Tensors]:
        """The personal model's containers as the base knows them, with what was received."""
        copies = (
            {n.removeprefix(p): t for n, t in private.items() if n.startswith(p)}
            for p in (SHARED, PRIVATE)
        )
        own_shared, own_private = copies
        besides = self.base.init_extras(0)
        return own_shared | {n: shared[n] for n in besides if n in shared}, own_private

    def init_private(self, seed: int, client: int) -> Tensors:
        """The base's, and the personal model's."""
        private = self.base.init_private(seed, client)
        return private | self._named(self.base.init_shared(seed), private)

    def init_private_from_data(self, private: Tensors, data: ClientData, seed: int) -> Tensors:
        """The base's tensors as the base fills them, in both models."""
        filled = self.base.init_private_from_data(self.without(private), data, seed)
        return private | filled | self._named({}, filled)

    def start_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Both models as the base starts from them."""
        own = self.base.start_round(*self._personal({}, private), round_info)
        s, p = self.base.start_round(shared, self.without(private), round_info)
        return s, p | self._named(*own)

    def end_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Both models as the base leaves them; the shared one goes up."""
        own = self.base.end_round(*self._personal({}, private), round_info)
        s, p = self.base.end_round(shared, self.without(private), round_info)
        return s, p | self._named(*own)

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """The personal model, or the global one."""
        if private is None:
            return self.base.encode(shared, None)
        return self.base.encode(*self._personal(shared, private))

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """The base's terms of the shared model, those of the personal one, and `ditto.prox`."""
        own_shared, own_private = self._personal(shared, private)
        rest = self.without(private)
        loss_terms = self.base.loss_terms(shared, rest, self.base.encode(shared, rest), batch)
        own = self.base.loss_terms(own_shared, own_private, encoded, batch)
        loss_terms |= {self.prefix + n: t for n, t in own.items()}
        distance_K = squared_distance(self.trained(own_shared), batch.round_info.received)
        return loss_terms | {"ditto.prox": self.config.lam / 2 * distance_K}

    def gradients(
        self, loss_terms: dict[str, Tensor], leaves: Tensors, batch: Batch
    ) -> dict[str, Tensor | None]:
        """The base's gradients of either model, and the pull towards what was received."""
        extra_loss_terms = {n.removeprefix(self.prefix): t for n, t in self.own(loss_terms).items()}
        prox_K = extra_loss_terms.pop("prox")
        first = self._copy_of("")
        copies = {n.removeprefix(first): t for n, t in leaves.items() if n.startswith(first)}
        others = {n: t for n, t in leaves.items() if not n.startswith(first)}
        found = self.base.gradients(self.without(loss_terms), others, batch)
        for n, gradient in self.base.gradients(extra_loss_terms, copies, batch).items():
            found[first + n] = gradient
        anchored = [n for n in copies if n.startswith("shared.")]
        pulls = torch.autograd.grad(prox_K.sum(), [copies[n] for n in anchored])
        for n, pull in zip(anchored, pulls, strict=True):
            found[first + n] = add(found[first + n], pull)
        return found
