"""Unbalanced transport: words' prompts that look like classes help these, and others replace them.

Source: the server of FOCoOp (Liao et al., ICML 2025, arXiv 2506.16218; code PengyangZhou/FOCoOp,
commit f30f6f3, whose transport is unbalanced on both sides; the paper calls it semi-unbalanced).
After FedAvg, the U E prompts of words of all U clients, o_i, are matched with the C mean contexts
of classes, g_c. With the cost |o_i - g_c|^2, divided by its largest entry, and uniform masses a and
b, the plan P minimises

    <cost, P> + rho KL(P 1 | a) + rho KL(P^T 1 | b)

(`parts/unbalanced.py`). The masses P 1 of the prompts are divided in two clusters by 2-means. Those
of the cluster with more mass "look like classes" (S):

    g_c <- g_c + (1 - ema) sum over i in S of C P_ic (o_i - g_c)

and the E prompts with the least mass are the new ones of the words; if fewer than E do not look
like classes, these are repeated. All other shared tensors are averaged by images.

How we differ: the code sets g to ema g + (1 - ema) P^T o. The columns of P sum to about 1 / C, so
that this shrinks every context by nearly one half per round; ours moves g_c towards the prompts in
proportion to the mass that it receives, where all of 1 / C moves it by 1 - ema. Its 2-means starts
at random; in one dimension the best division can be found exactly, and ours is. Clients weigh by
images, there by batches. As in the code, a prompt may get another word than it was trained with,
and copies of one prompt from several clients may all be among the new ones.

The strategy needs every client's upload, so secure aggregation is impossible with it.

Suffixes: U clients, E words, C classes, P numbers of a prompt, I prompts of all words, U E of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedprompt.config.fields import option
from fedprompt.errors import UserError
from fedprompt.federation.screening import Update
from fedprompt.messages import Arrays

from .fedavg import FedAvg, FedAvgConfig
from .parts.required import require_shared
from .parts.unbalanced import transport, upper_cluster

CLASSES, WORDS = "ctx_global", "ctx_ood"
"""The shared tensors (C, M, d) and (E, M, d)."""


@dataclass(frozen=True)
class UnbalancedTransportConfig(FedAvgConfig):
    """Defaults: the code's."""

    name: str = option("unbalanced_transport", "strategy name")
    mass_penalty: float = option(0.1, "rho: weight of masses that differ from uniform ones", gt=0)
    ema: float = option(0.5, "share of a class's context that stays in any case", ge=0, le=1)
    iterations: int = option(1000, "iterations of the plan at most", ge=1)


class UnbalancedTransport(FedAvg):
    """FedAvg, and an exchange between the prompts of classes and of words.

    Raises:
        UserError: the method does not share prompts of classes and of words of one shape.
    """

    name = "unbalanced_transport"
    Config = UnbalancedTransportConfig
    linear_in_updates = False
    config: UnbalancedTransportConfig

    def __init__(self, config: Any, *, shapes: Mapping[str, tuple[int, ...]], **rest: Any) -> None:
        for tensor in (CLASSES, WORDS):
            require_shared(self.name, tensor, shapes, example="focoop")
        if shapes and shapes[CLASSES][1:] != shapes[WORDS][1:]:
            raise UserError(
                f"strategy {self.name}: '{CLASSES}' has prompts of shape {shapes[CLASSES][1:]} and "
                f"'{WORDS}' of {shapes[WORDS][1:]}; they must be equal."
            )
        super().__init__(config, shapes=shapes, **rest)

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """The means, with the exchange, float32."""
        mean = super().aggregate(server_round, shared, updates)
        if not updates or WORDS not in mean:
            return mean
        words, shape = len(mean[WORDS]), mean[CLASSES].shape
        classes_CP = mean[CLASSES].reshape(shape[0], -1).astype(np.float64)
        prompts_IP = np.concatenate(
            [update.arrays[WORDS].reshape(words, -1) for update in updates]
        ).astype(np.float64)
        plan_IC = transport(
            prompts_IP, classes_CP, self.config.mass_penalty, self.config.iterations
        )
        mass_I = plan_IC.sum(1)
        like_class_I = upper_cluster(mass_I)
        # Einstein sums in a fixed order, so that no processor's matrix product decides last bits.
        moved_IC = shape[0] * (1 - self.config.ema) * plan_IC * like_class_I[:, None]
        pulled_CP = np.einsum("ic,ip->cp", moved_IC, prompts_IP)
        after_CP = classes_CP + pulled_CP - moved_IC.sum(0)[:, None] * classes_CP
        by_mass = np.argsort(mass_I, kind="stable")
        others = by_mass[~like_class_I[by_mass]]
        # `resize` repeats them where there are too few.
        chosen = np.resize(others[:words], words)
        return {
            **mean,
            CLASSES: after_CP.reshape(shape).astype(np.float32),
            WORDS: prompts_IP[chosen].reshape(mean[WORDS].shape).astype(np.float32),
        }
