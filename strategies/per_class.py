"""Per-class masked averaging: each class's row is averaged over the clients that hold the class.

For methods whose shared tensors have one row per class (CoOp's class-specific contexts; Zhou et
al., IJCV 2022). With n_{k,c} images of class c on client k,

    row_c <- sum_k n_{k,c} row_{k,c} / sum_k n_{k,c}

and row_c stays unchanged if no client has the class. The strategy is ours: the paper is not
federated. n_{k,c} is the client's `class_shares` times its number of training images; the server
keeps neither, and sends zeros back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedprompt.config.fields import option
from fedprompt.errors import UserError
from fedprompt.federation.screening import Update
from fedprompt.federation.strategy import SharedPromptStrategy, StrategyConfig
from fedprompt.messages import Arrays
from strategies.parts.required import require_shared

SHARES = "class_shares"
"""The shared tensor (C,) that says how a client's training images spread over classes."""


@dataclass(frozen=True)
class PerClassConfig(StrategyConfig):
    """The options that every strategy has, and no others."""

    name: str = option("per_class", "strategy name")


class PerClass(SharedPromptStrategy):
    """`row_c <- sum_k n_{k,c} row_{k,c} / sum_k n_{k,c}` for every class c.

    Raises:
        UserError: the method uploads no class shares, or a tensor without a row per class.
    """

    name = "per_class"
    Config = PerClassConfig

    def __init__(self, config: Any, *, shapes: Mapping[str, tuple[int, ...]], **rest: Any) -> None:
        require_shared(self.name, SHARES, shapes, example="coop_csc")
        for name, shape in sorted(shapes.items()):
            if shape[:1] != shapes[SHARES]:
                raise UserError(
                    f"strategy per_class needs one row per class; '{name}' is {tuple(shape)}, but "
                    f"there are {shapes[SHARES][0]} classes."
                )
        super().__init__(config, shapes=shapes, **rest)

    @classmethod
    def works_without_rounds(cls) -> bool:
        """No: the class shares of an upload are no change that staleness could scale."""
        return False

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """The masked mean of every class's rows, float32; zeros for the class shares."""
        if not shared:
            return {}
        counts_UC = np.stack([class_counts(u) for u in updates])
        total_C = counts_UC.sum(0)
        # Rows of classes that no client has in this round stay unchanged.
        held_C = total_C > 0
        mean: Arrays = {}
        for name, last in shared.items():
            if name == SHARES:
                # The server must not send the clients' class mix to the others.
                mean[name] = np.zeros_like(last)
                continue
            weight_UC = counts_UC / np.where(held_C, total_C, 1)
            rows = np.zeros(last.shape, dtype=np.float64)
            for update, weight_C in zip(updates, weight_UC, strict=True):
                # row_c <- sum_k n_{k,c} row_{k,c} / sum_k n_{k,c}.
                rows += update.arrays[name] * weight_C.reshape(-1, *(1,) * (last.ndim - 1))
            mean[name] = last.copy()
            mean[name][held_C] = rows[held_C].astype(np.float32)
        return mean


def class_counts(update: Update) -> NDArray[np.float64]:
    """Training images per class (C,) as a client reports them; at most its number of images."""
    # The shares come from a client and may be out of range.
    shares_C = np.clip(update.arrays[SHARES].astype(np.float64), 0, 1)
    counts_C: NDArray[np.float64] = np.rint(shares_C * update.num_examples)
    return counts_C
