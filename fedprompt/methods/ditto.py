"""Ditto: any prompt method, and a personal copy of its prompts that stays close to the shared ones.

Source: Ditto: Fair and Robust Federated Learning Through Personalization (Li, Hu, Beirami, Smith,
ICML 2021, arXiv 2012.04221), algorithm 1; public code https://github.com/litian96/ditto. With the
shared tensors w and a client's own copy v of them:

    w <- w - lr * grad F_k(w)                                  uploaded and averaged as usual
    v <- v - lr * (grad F_k(v) + lam * (v - w_received))       stays on the client

Both models see the same batches. The client predicts with v; the global model is w. If the base has
private tensors, each model has its own set of them. The copy v starts from the same values as w.

How we differ: both models are updated by the configured optimiser (the paper's steps are plain
SGD). The paper tunes lam per data set (its code lets clients choose among 0.1, 1 and 2 on
validation data); here it is one number, 1, as in the example scripts of the code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.methods.base import Batch, ClientData, RoundInfo, Task, Tensors
from fedprompt.methods.method_config import allows_other_image_towers
from fedprompt.methods.parts.nested import Parts
from fedprompt.methods.parts.wrapper import (
    BASE,
    WrappedMethod,
    WrapperConfig,
    add,
    squared_distance,
)

PERSONAL_SHARED, PERSONAL_PRIVATE = "personal shared", "personal private"
"""The parts that hold the personal model: copies of the base's two containers, both private."""
PROX = "ditto.prox"
"""The term that pulls the personal model towards the received prompts."""


@dataclass(frozen=True)
class DittoConfig(WrapperConfig):
    """Ditto's weight."""

    @property
    def token_space(self) -> bool:
        """The base's declaration."""
        return allows_other_image_towers(self._base())

    lam: float = option(
        1.0, "weight lambda of the pull towards the shared prompts", ge=0, search=log_range(0.01, 5)
    )


class Ditto(WrappedMethod):
    """Two models of the base: one on the shared tensors, one on the client's copy of them."""

    name = "ditto"
    source = "Li et al., ICML 2021"
    Config = DittoConfig

    def __init__(self, config: DittoConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        base = self.base
        self.private_layout = self.private_layout.with_part(
            PERSONAL_SHARED, base.init_shared(0), "ditto.shared."
        ).with_part(PERSONAL_PRIVATE, base.init_private(0, 0), "ditto.private.")
        self.copies = {
            f"{container}.{name}": f"private.{flat}"
            for container, part in (("shared", PERSONAL_SHARED), ("private", PERSONAL_PRIVATE))
            for name, flat in self.private_layout.flat_names[part].items()
        }
        """The personal model's leaf for each leaf of the base, e.g. of `shared.ctx`."""
        # The copy is trained exactly as the original: the same frozen tensors, the same rates.
        self.frozen = base.frozen | {self.copies[n] for n in base.frozen}
        copied_scale = {self.copies[n]: factor for n, factor in base.lr_scale.items()}
        self.lr_scale = {**base.lr_scale, **copied_scale}

    def _personal(self, shared: Tensors, private: Parts) -> tuple[Tensors, Tensors]:
        """The personal model's containers under the base's names, with the extras in `shared`."""
        # Extras are sent by the server and exist once; both models of a client read them.
        extras = {n: shared[n] for n in self.base.init_extras(0) if n in shared}
        return private[PERSONAL_SHARED] | extras, private[PERSONAL_PRIVATE]

    def init_private(self, seed: int, client: int) -> Tensors:
        """The base's tensors, and the personal model's."""
        private = self.base.init_private(seed, client)
        # v starts where w starts, so the same seed gives the starting values of both.
        shared = self.base.init_shared(seed)
        return self.private_layout.flatten(
            {BASE: private, PERSONAL_SHARED: shared, PERSONAL_PRIVATE: private}
        )

    def init_private_from_data(self, private: Tensors, data: ClientData, seed: int) -> Tensors:
        """Let the base complete its private tensors; both models start from the result."""
        parts = self.private_layout.nest(private)
        completed = self.base.init_private_from_data(parts[BASE], data, seed)
        parts[BASE] = parts[PERSONAL_PRIVATE] = completed
        return self.private_layout.flatten(parts)

    def start_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Let the base prepare both models."""
        p = self.private_layout.nest(private)
        # Hooks of a round receive the shared container without extras, hence the empty dict.
        personal = self.base.start_round(*self._personal({}, p), round_info)
        p[PERSONAL_SHARED], p[PERSONAL_PRIVATE] = personal
        shared, p[BASE] = self.base.start_round(shared, p[BASE], round_info)
        return shared, self.private_layout.flatten(p)

    def at_rest(self, private: Tensors, round_info: RoundInfo) -> Tensors:
        """The base's tensors at rest, in each of the two models."""
        p = self.private_layout.nest(private)
        personal = self.base.at_rest(p[PERSONAL_PRIVATE], round_info)
        return self.base.at_rest(p[BASE], round_info) | {
            self.copies[n]: rest_K for n, rest_K in personal.items()
        }

    def end_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Let the base finish both models; the shared one is uploaded."""
        p = self.private_layout.nest(private)
        personal = self.base.end_round(*self._personal({}, p), round_info)
        p[PERSONAL_SHARED], p[PERSONAL_PRIVATE] = personal
        shared, p[BASE] = self.base.end_round(shared, p[BASE], round_info)
        return shared, self.private_layout.flatten(p)

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """The personal model v; the global model w without private tensors."""
        if private is None:
            return self.base.encode(shared, None)
        return self.base.encode(*self._personal(shared, self.private_layout.nest(private)))

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """The base's terms for the shared model, `ditto.` terms for the personal one, and PROX."""
        p = self.private_layout.nest(private)
        # `encoded` is the personal model's; the shared model is encoded here.
        shared_encoded = self.base.encode(shared, p[BASE])
        terms = self.base.loss_terms(shared, p[BASE], shared_encoded, batch)
        personal = self.base.loss_terms(*self._personal(shared, p), encoded, batch)
        # The pull is towards w as received, which is constant during the round, and not towards the
        # w that is trained beside v.
        copies = {n: p[PERSONAL_SHARED][n] for n in self.learned}
        distance_K = squared_distance(copies, batch.round_info.received)
        return (
            terms
            | {_personal_term(n): t for n, t in personal.items()}
            # Its gradient is lam * (v - w_received), as in the module's docstring.
            | {PROX: self.config.lam / 2 * distance_K}
        )

    def gradients(
        self, loss_terms: dict[str, Tensor], leaves: Tensors, batch: Batch
    ) -> dict[str, Tensor | None]:
        """The base's gradients of each model, and the pull towards the received prompts."""
        # The base is asked once for each model, so that a base that projects or clips its gradients
        # does so for w and for v separately, as it would alone.
        terms = {n: t for n, t in loss_terms.items() if _personal_term(n) in loss_terms}
        personal_terms = {n: loss_terms[_personal_term(n)] for n in terms}
        personal_leaves = {n: leaves[copy] for n, copy in self.copies.items() if copy in leaves}
        shared_leaves = {n: t for n, t in leaves.items() if n not in self.copies.values()}
        gradients = self.base.gradients(terms, shared_leaves, batch)
        for n, gradient in self.base.gradients(personal_terms, personal_leaves, batch).items():
            gradients[self.copies[n]] = gradient
        anchored = [self.copies[f"shared.{n}"] for n in self.learned]
        pulls = torch.autograd.grad(loss_terms[PROX].sum(), [leaves[n] for n in anchored])
        for n, pull in zip(anchored, pulls, strict=True):
            gradients[n] = add(gradients[n], pull)
        return gradients


def _personal_term(name: str) -> str:
    """The name of the personal model's loss term that corresponds to one of the base."""
    return f"ditto.{name}"
