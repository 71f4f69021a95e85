"""Aligned: clients count by how well their change agrees with the consensus, within a trust region.

A rule of ours. The consensus is the coordinate median of the clients' changes scaled to norm 1; the
agreement a_k is the cosine of client k's change with it, over all shared tensors together. Then
    w_k  ~  n_k exp(sharpness (a_k - 1)),   step = sum_k w_k Delta_k,
and the step is shortened to norm `trust x median_k |Delta_k|` where it is longer. Sharpness 0 and
no trust region are FedAvg; the larger the sharpness, the less those count who pull elsewhere.

Nearest published rules: FLTrust (Cao et al., NDSS 2021, arXiv 2012.13995) weighs by the cosine with
an update that the server trains itself, which needs data on the server; Krishna Pillutla et al.'s
RFA (IEEE TSP 2022, arXiv 1912.13445) re-weighs by the distance to the geometric median.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedprompt.options import option
from strategies.base import SharedPromptStrategy, StrategyConfig
from strategies.screening import Arrays, Update
from strategies.vectors import Rows, changes, clipped, combined, moved, norms, sample_shares, units


@dataclass(frozen=True)
class AlignedConfig(StrategyConfig):
    """Sharpness 0 and trust null are FedAvg."""

    name: str = option("aligned", "strategy name")
    sharpness: float = option(5.0, "how much agreement counts; 0 = not at all", ge=0)
    trust: float | None = option(
        1.0, "longest step, in median norms of the clients' changes; null = unlimited", gt=0
    )


class Aligned(SharedPromptStrategy):
    """FedAvg whose weights fall with disagreement and whose step is bounded."""

    name = "aligned"
    Config = AlignedConfig
    config: AlignedConfig

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """One step towards those who agree."""
        rows_UP, trust = changes(shared, updates), self.config.trust
        weights_U = sample_shares(updates)
        weights_U = weights_U * np.exp(self.config.sharpness * (agreement(rows_UP) - 1))
        step_P = combined(weights_U / weights_U.sum(), rows_UP)
        if trust is not None:
            step_P = clipped(step_P[None], trust * float(np.median(norms(rows_UP))))[0]
        return moved(shared, step_P)


def agreement(rows_UP: Rows) -> Rows:
    """Cosine of every change with the consensus: (U,); 0 for a change of norm 0."""
    units_UP = units(rows_UP)
    consensus_P = units(np.median(units_UP, axis=0)[None])[0]
    return np.asarray((units_UP * consensus_P).sum(axis=1))
