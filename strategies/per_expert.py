"""Mean per expert: each expert's tensors are averaged by how much the clients' gates use it.

For methods whose shared tensors belong to experts (MoCoOp): a tensor called `name.e` belongs to
expert e. With n_k training images and s_{k,e} the mean weight that client k's gate gives expert e,

    w_e <- sum_k n_k s_{k,e} w_{k,e} / sum_k n_k s_{k,e}

and w_e stays unchanged if no client uses the expert. Other tensors are averaged by n_k alone. The
strategy is ours: the papers are not federated. A client uploads s_k as `expert_shares`; the server
does not keep it, and sends zeros back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedprompt.config.fields import option
from fedprompt.errors import UserError
from fedprompt.federation.screening import Update
from fedprompt.federation.strategy import SharedPromptStrategy, StrategyConfig
from fedprompt.messages import Arrays
from strategies.fedavg import weighted_mean
from strategies.parts.required import require_shared

SHARES = "expert_shares"
"""The shared tensor (G,): the mean weight that a client's gate gives each expert."""


@dataclass(frozen=True)
class PerExpertConfig(StrategyConfig):
    """The options that every strategy has, and no others."""

    name: str = option("per_expert", "strategy name")


class PerExpert(SharedPromptStrategy):
    """`w_e <- sum_k n_k s_{k,e} w_{k,e} / sum_k n_k s_{k,e}` for every expert e.

    Raises:
        UserError: the method uploads no expert shares, or a tensor of an expert without one.
    """

    name = "per_expert"
    Config = PerExpertConfig

    def __init__(self, config: Any, *, shapes: Mapping[str, tuple[int, ...]], **rest: Any) -> None:
        require_shared(self.name, SHARES, shapes, example="mocoop")
        for name in sorted(shapes):
            expert = _expert(name)
            if expert is not None and expert >= shapes[SHARES][0]:
                raise UserError(
                    f"strategy per_expert: '{name}' belongs to expert {expert}, but there are "
                    f"shares of {shapes[SHARES][0]} experts."
                )
        super().__init__(config, shapes=shapes, **rest)

    @classmethod
    def works_without_rounds(cls) -> bool:
        """No: the expert shares of an upload are no change that staleness could scale."""
        return False

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """The weighted means, float32; zeros for the expert shares."""
        mean: Arrays = {}
        for name, last in shared.items():
            if name == SHARES:
                # The server must not send the clients' shares to the others.
                mean[name] = np.zeros_like(last)
                continue
            weights = [_weight(update, _expert(name)) for update in updates]
            used = sum(weights) > 0
            mean[name] = weighted_mean({name: last}, updates, weights)[name] if used else last
        return mean


def _expert(name: str) -> int | None:
    """The expert that a tensor belongs to; None if it belongs to all."""
    _, dot, last = name.rpartition(".")
    return int(last) if dot and last.isdecimal() else None


def _weight(update: Update, expert: int | None) -> float:
    """n_k s_{k,e}, or n_k for a tensor of all experts."""
    if expert is None:
        return float(update.num_examples)
    # The shares come from a client and may be out of range.
    return update.num_examples * float(np.clip(update.arrays[SHARES][expert], 0, 1))
