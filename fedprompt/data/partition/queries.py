"""Active learning: which images a client asks labels for, and when.

With `partition.labels_per_round` the labels of a client's training images are hidden at first, and
the rounds of a run are divided into active rounds. At the start of each, every client asks for the
labels of a few more images, and prompts and private tensors start again. Any method can be trained
in this way: it is given the labelled images only (or all images, if it learns without labels).

Source: Active Prompt Learning in Vision Language Models (Bang, Ahn, Lee, CVPR 2024, arXiv
2311.11178; public code kaist-dmlab/pcb at 7f32a1b). The first query is random. Later, a rule
(random, entropy, coreset, BADGE) ranks the images with the model of the last active round. With PCB
the first `query_candidates` of all images are candidates, and of these the client takes, again and
again, one of the pseudo-class for which it has the fewest labels so far.

How we differ: each client selects among its own images and balances its own classes, and neither
images, pseudo-labels nor counts by class leave it. The released code counts a label only when a
candidate of the rarest class was found, so one class without candidates makes every further draw
random; here such a class is left out, and the next rarest is served. Its BADGE writes the
gradients of the last, smaller batch into the wrong rows, and stops in a debugger when all
distances are zero; here distances follow from inner products, and equal images are taken in their
order. Its random rule proposes exactly as many images as are asked for, so that PCB changes
nothing there; here it proposes as many candidates as the other rules.

The state is one private tensor per client: the active round, from 1, in which each image's label
was asked for, and 0 for hidden labels. It is stored beside the private tensors of the method and
never uploaded.

Suffixes: N images of a client, M images of the pool, C classes, D width of the features.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedprompt.config.schema import PartitionConfig

OF_LABELS = "labels/"
"""What precedes the names of what a client stores about its labels; no method's tensor has a slash.
"""
ASKED = f"{OF_LABELS}asked"
"""The name of the state in a store of private tensors."""
Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


def select(
    options: PartitionConfig,
    features_ND: Floats,
    answers_NC: Floats,
    labels_N: Rows,
    draw: np.random.Generator,
) -> Rows:
    """The images whose labels a client asks for.

    Args:
        options: the rule, the number of labels and the share of candidates.
        features_ND: L2-normalised image features.
        answers_NC: the model's probabilities.
        labels_N: class of each image, negative where the label is hidden.
        draw: draws of this client and active round.

    Returns:
        Their rows; fewer than `labels_per_round` if no more are hidden.
    """
    pool_M = np.flatnonzero(labels_N < 0)
    budget = min(options.labels_per_round, len(pool_M))
    known_N = labels_N >= 0
    # There is no trained model yet, and nothing to be far from.
    if not known_N.any():
        return draw.permutation(pool_M)[:budget]
    wanted = budget
    if options.query_balanced:
        wanted = min(len(pool_M), max(budget, int(options.query_candidates * len(labels_N))))
    answers_MC = answers_NC[pool_M]
    if options.query == "random":
        ranked = draw.permutation(len(pool_M))[:wanted]
    elif options.query == "entropy":
        ranked = by_entropy(answers_MC)[:wanted]
    elif options.query == "coreset":
        ranked = by_distance(features_ND[known_N], features_ND[pool_M], wanted)
    else:
        ranked = by_gradient(features_ND[pool_M], answers_MC, wanted, draw)
    if options.query_balanced:
        counts_C = np.bincount(labels_N[known_N], minlength=answers_NC.shape[1])
        ranked = ranked[balanced(answers_MC[ranked].argmax(1), counts_C, budget, draw)]
    return pool_M[ranked]


def by_entropy(answers_MC: Floats) -> Rows:
    """Images by falling entropy of the model's answer."""
    entropy_M = -(answers_MC * np.log(answers_MC + 1e-6)).sum(1)
    return np.argsort(-entropy_M, kind="stable")


def by_distance(known_ND: Floats, pool_MD: Floats, wanted: int) -> Rows:
    """Coreset (Sener and Savarese, ICLR 2018): each time the image farthest from all taken ones."""
    nearest_M = np.full(len(pool_MD), np.inf)
    for row_D in known_ND:
        nearest_M = np.minimum(nearest_M, np.linalg.norm(pool_MD - row_D, axis=1))
    taken: list[int] = []
    while len(taken) < wanted:
        taken.append(int(nearest_M.argmax()))
        nearest_M = np.minimum(nearest_M, np.linalg.norm(pool_MD - pool_MD[taken[-1]], axis=1))
        nearest_M[taken] = -1  # equal images are taken one after the other
    return np.array(taken, dtype=np.int64)


def by_gradient(
    pool_MD: Floats, answers_MC: Floats, wanted: int, draw: np.random.Generator
) -> Rows:
    """BADGE (Ash et al., ICLR 2020): k-means++ on gradients of the last layer.

    The gradient of an image is (1[c = argmax p] - p_c) v for all classes c. Its inner products are
    those of the two factors, so no vector of C D numbers is formed.
    """
    factor_MC = -answers_MC
    factor_MC[np.arange(len(factor_MC)), answers_MC.argmax(1)] += 1
    squared_M = (factor_MC**2).sum(1) * (pool_MD**2).sum(1)
    taken = [int(squared_M.argmax())] if wanted else []
    nearest_M = np.full(len(pool_MD), np.inf)
    while len(taken) < wanted:
        last = taken[-1]
        products_M = (factor_MC @ factor_MC[last]) * (pool_MD @ pool_MD[last])
        distance_M = np.sqrt(np.maximum(squared_M + squared_M[last] - 2 * products_M, 0))
        nearest_M = np.minimum(nearest_M, distance_M)
        nearest_M[taken] = 0
        weight_M = np.cumsum(nearest_M**2)
        if weight_M[-1] > 0:
            chosen = int(np.searchsorted(weight_M, draw.random() * weight_M[-1], side="right"))
        else:
            chosen = next(m for m in range(len(pool_MD)) if m not in taken)
        taken.append(min(chosen, len(pool_MD) - 1))
    return np.array(taken, dtype=np.int64)


def balanced(
    pseudo_M: Rows, counts_C: NDArray[np.int64], wanted: int, draw: np.random.Generator
) -> Rows:
    """PCB: candidates of the pseudo-classes with the fewest labels so far.

    Args:
        pseudo_M: the class that the model gives each candidate.
        counts_C: the client's labels by class.
        wanted: how many to take.
        draw: which candidate of a class is taken.

    Returns:
        Rows of `pseudo_M`.
    """
    counts_C = counts_C.copy()
    left = {c: draw.permutation(np.flatnonzero(pseudo_M == c)).tolist() for c in set(pseudo_M)}
    taken: list[int] = []
    while len(taken) < wanted:
        # A class without candidates is left out; see the module's docstring.
        rarest = min((c for c, rows in left.items() if rows), key=lambda c: (counts_C[c], c))
        taken.append(left[rarest].pop())
        counts_C[rarest] += 1
    return np.array(taken, dtype=np.int64)
