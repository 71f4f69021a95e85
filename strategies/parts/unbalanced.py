"""Unbalanced optimal transport between two sets of points, and the division of masses in two.

Source of the algorithm: Unbalanced Optimal Transport through Non-negative Penalized Linear
Regression (Chapel, Flamary, Wu, Févotte, Gasso, NeurIPS 2021, arXiv 2106.04145): majorisation and
minimisation, which needs no entropy. FOCoOp's code calls it in the library POT, with whose
`ot.unbalanced.mm_unbalanced` (0.9.7) plans agree to 1e-13 of their largest entry.

Suffixes: I sources, J targets, P numbers of a point.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
CONVERGED = 1e-15
"""Largest change of the plan, in the Frobenius norm, after which the iteration stops."""


def transport(sources_IP: Floats, targets_JP: Floats, penalty: float, iterations: int) -> Floats:
    """The plan (I, J) of least squared distance, whose masses may differ from uniform ones.

    It minimises <M, P> + penalty (KL(P 1 | 1/I) + KL(P^T 1 | 1/J)) with M the squared distances,
    divided by their largest.

    Args:
        sources_IP: points that send mass.
        targets_JP: points that receive it.
        penalty: weight of the divergences.
        iterations: steps at most.
    """
    squares_I1 = (sources_IP**2).sum(1)[:, None]
    cost_IJ = (
        squares_I1 + (targets_JP**2).sum(1) - 2 * np.einsum("ip,jp->ij", sources_IP, targets_JP)
    )
    cost_IJ = np.maximum(cost_IJ, 0)
    largest = cost_IJ.max()
    if largest > 0:
        cost_IJ /= largest
    uniform = 1 / cost_IJ.size
    kernel_IJ = np.sqrt(uniform) * np.exp(-cost_IJ / (2 * penalty))
    plan_IJ = np.full(cost_IJ.shape, uniform)
    for _ in range(iterations):
        former_IJ = plan_IJ
        masses_IJ = np.sqrt(former_IJ.sum(1)[:, None] * former_IJ.sum(0)) + 1e-16
        plan_IJ = kernel_IJ * former_IJ / masses_IJ
        if np.linalg.norm(plan_IJ - former_IJ) < CONVERGED:
            break
    return plan_IJ


def upper_cluster(values_I: Floats) -> NDArray[np.bool_]:
    """Which values belong to the upper one of the two clusters of 2-means; none if all are equal.

    Sorted values are divided at one place in the best division, so all places are tried.
    """
    ascending = np.sort(values_I)
    if ascending[0] == ascending[-1]:
        return np.zeros(len(values_I), dtype=bool)
    below = np.arange(1, len(ascending))
    sums, total = np.cumsum(ascending)[:-1], ascending.sum()
    # The sum of squares within clusters is least where that between them is largest.
    between = sums**2 / below + (total - sums) ** 2 / (len(ascending) - below)
    # Equal values stay together.
    between[np.diff(ascending) == 0] = -np.inf
    return np.asarray(values_I >= ascending[int(between.argmax()) + 1])
