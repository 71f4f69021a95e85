"""FLAME: cluster the clients' models, clip the largest cluster to the median norm, add noise.

Source: FLAME: Taming Backdoors in Federated Learning (Nguyen, Rieger, Chen, Yalame, Möllering,
Fereidooni, Marchal, Miettinen, Mirhoseini, Zeitouni, Koushanfar, Sadeghi, Schneider, USENIX
Security 2022, arXiv 2101.02281), algorithm 1, for n clients' models W_i and the last global one G:

    accepted   the cluster of HDBSCAN on the cosine distances between the W_i, with
               min_cluster_size = n // 2 + 1, min_samples = 1 and a single cluster allowed
    S          = median_i |W_i - G|, over all n
    G         <- G + mean over accepted of (W_i - G) min(1, S / |W_i - G|) + N(0, (lambda S)^2)

The noise is in every number, and lambda = 0.001 is the paper's value for images.

With these settings HDBSCAN needs no library of its own: a mutual reachability distance is then the
distance itself, so the hierarchy is that of single linkage; two clusters cannot both have more than
half of the clients, so nothing but the root remains; and of the root those points are kept that are
still connected where it falls apart. That is the first component of single linkage with more than
half of the clients. `tests/strategies/test_flame.py` compares it with scikit-learn's HDBSCAN.

How we differ: the noise is drawn from the run's seed, so that a run can be repeated. It protects
against backdoors, not privacy: for that, use `dp_fedavg`.

Suffixes: U updates, P numbers of all shared tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from fedprompt.config.fields import option
from fedprompt.federation.screening import Update
from fedprompt.federation.strategy import SharedPromptStrategy, StrategyConfig
from fedprompt.messages import Arrays
from fedprompt.rng import generator

from .parts.vectors import Rows, changes, clipped, flat, moved, norms, units


@dataclass(frozen=True)
class FlameConfig(StrategyConfig):
    """The noise; clustering and clipping have no options."""

    name: str = option("flame", "strategy name")
    noise: float = option(
        0.001, "lambda: the noise's standard deviation over the median norm", ge=0
    )


class Flame(SharedPromptStrategy):
    """Mean of the clipped changes of the clients in the largest cluster, plus noise."""

    name = "flame"
    Config = FlameConfig
    config: FlameConfig

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config, **options)
        self._left_out: list[int] = []

    @property
    def weights_by_examples(self) -> bool:
        """Never: a client's claim has no weight here."""
        return False

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """One step of algorithm 1."""
        rows_UP = changes(shared, updates)
        kept_U = largest_cluster(cosine_distances(rows_UP + flat(shared, shared)))
        self._left_out = [u.client for u, kept in zip(updates, kept_U, strict=True) if not kept]
        bound = float(np.median(norms(rows_UP)))
        step_P = clipped(rows_UP[kept_U], bound).mean(axis=0)
        noise_P = generator(self.seed, "flame", server_round).standard_normal(step_P.shape)
        return moved(shared, step_P + self.config.noise * bound * noise_P)

    def metrics(self) -> dict[str, Any]:
        """The clients that were left out of the round's mean; none in a round without a mean."""
        return {"left_out": self._left_out}

    def forget_round(self) -> None:
        """Nobody was left out of a mean."""
        self._left_out = []


def cosine_distances(rows_UP: Rows) -> Rows:
    """1 - cosine of each pair of rows, (U, U); a row of zeros is at 1 from every other."""
    unit_UP = units(rows_UP)
    # Row by row: the order of additions in a matrix product depends on the processor.
    cosine_UU = np.stack([(unit_UP * row_P).sum(axis=1) for row_P in unit_UP])
    distance_UU = np.maximum(1 - cosine_UU, 0.0)
    np.fill_diagonal(distance_UU, 0.0)
    return np.asarray(distance_UU)


def largest_cluster(distance_UU: Rows) -> NDArray[np.bool_]:
    """Which rows belong to the first component of single linkage with more than half of them.

    Args:
        distance_UU: symmetric distances, with zeros on the diagonal.

    Returns:
        A boolean array (U,), true for more than half of the rows.
    """
    count = len(distance_UU)
    if count < 2:
        return np.ones(count, dtype=bool)
    merges = linkage(squareform(distance_UU, checks=False), method="single")
    # Column 2 is the height of a merge, column 3 how many rows it joins; heights never fall.
    height = merges[merges[:, 3] > count // 2, 2][0]
    labels_U = fcluster(merges, height, criterion="distance")
    return np.asarray(labels_U == np.bincount(labels_U).argmax())
