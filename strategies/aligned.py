"""Aligned: clients count by how well they agree with the consensus, within a trust region.

A strategy of ours. The consensus of a round is the coordinate median of the clients' changes, each
of which is first mixed with those of the majority nearest to it (see `parts/robust.py`). The
agreement a_k is the cosine of client k's change Delta_k with the consensus, over all shared tensors
together. Every client has a score, which starts at 0:
    score_k <- min(credit, score_k + a_k)
    w_k  ~  n_k exp(sharpness min(0, score_k)),     step = sum_k w_k clip(Delta_k)
where clip projects every client's prompts onto a ball around the last global ones, with radius
`trust x median_k |Delta_k|`. Clients that agree on the whole thus count as in FedAvg, whatever a
single round says, while a client that keeps pulling elsewhere counts less from round to round.
Sharpness 0 without a trust region is FedAvg.

Nearest published strategies: FLTrust (Cao et al., NDSS 2021, arXiv 2012.13995) weighs by the cosine
with an update that the server trains itself, which needs data on the server; FoolsGold (Fung et
al., RAID 2020, arXiv 1808.04866) also remembers earlier rounds, but penalises agreement instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedprompt.config.fields import option
from fedprompt.federation.screening import Update
from fedprompt.federation.strategy import SharedPromptStrategy, StrategyConfig
from fedprompt.messages import Arrays

from .parts.robust import mixed
from .parts.vectors import Rows, changes, clipped, combined, moved, norms, sample_shares, units

CLIENTS, SCORES = "clients", "scores"
"""Names in the state: client ids, ascending, and their scores."""


@dataclass(frozen=True)
class AlignedConfig(StrategyConfig):
    """Sharpness 0 with trust null is FedAvg."""

    name: str = option("aligned", "strategy name")
    sharpness: float = option(10.0, "how much disagreement counts; 0 = not at all", ge=0)
    credit: float = option(3.0, "highest score: what a client may lose before it counts less", ge=0)
    trust: float | None = option(
        1.5, "largest change, in median norms of the round's changes; null = unlimited", gt=0
    )


class Aligned(SharedPromptStrategy):
    """FedAvg of bounded changes, with weights that fall with disagreement."""

    name = "aligned"
    Config = AlignedConfig
    config: AlignedConfig
    remembers_clients = True

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config, **options)
        self.scores: dict[int, float] = {}

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """One step towards the clients that agree."""
        rows_UP, trust = changes(shared, updates), self.config.trust
        for update, cosine in zip(updates, agreement(rows_UP), strict=True):
            # score_k <- min(credit, score_k + a_k).
            score = self.scores.get(update.client, 0.0) + float(cosine)
            self.scores[update.client] = min(self.config.credit, score)
        # Only a negative score lowers the weight; a positive one is credit for later rounds.
        lost_U = np.array([min(0.0, self.scores[u.client]) for u in updates])
        # The largest factor is exp(0), so the sum cannot vanish even if all scores are very low.
        factor_U = np.exp(self.config.sharpness * (lost_U - lost_U.max()))
        # w_k ~ n_k exp(sharpness min(0, score_k)).
        weights_U = sample_shares(updates) * factor_U
        if trust is not None:
            rows_UP = clipped(rows_UP, trust * float(np.median(norms(rows_UP))))
        return moved(shared, combined(weights_U / weights_U.sum(), rows_UP))

    def metrics(self) -> dict[str, Any]:
        """The clients that count less than in FedAvg, with their scores."""
        return {"below_zero": {str(c): s for c, s in sorted(self.scores.items()) if s < 0}}

    def state(self) -> Arrays:
        """The score of every client that has ever replied."""
        if not self.scores:
            return {}
        clients = sorted(self.scores)
        scores = np.array([self.scores[c] for c in clients], dtype=np.float64)
        return {CLIENTS: np.array(clients, dtype=np.int64), SCORES: scores}

    def load_state(self, state: Arrays) -> None:
        """Restore what `state` has returned."""
        pairs = zip(state[CLIENTS], state[SCORES], strict=True) if state else ()
        self.scores = {int(client): float(score) for client, score in pairs}


def agreement(rows_UP: Rows) -> Rows:
    """Cosine of every change with the consensus, (U,); 0 for a change of norm 0."""
    # Fewer than half of the clients are left out: each row is the mean of a majority.
    mixed_UP = mixed(rows_UP, (len(rows_UP) - 1) // 2)
    consensus_P = units(np.median(mixed_UP, axis=0)[None])[0]
    return np.asarray((units(rows_UP) * consensus_P).sum(axis=1))
