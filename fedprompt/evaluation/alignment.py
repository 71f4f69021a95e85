"""MoDA, the model-data alignment of COTE: how evenly pseudo-labels are spread over the classes.

Source: Controllable Federated Prompt Learning at Test Time (Zhu et al., CVPR 2026), which has no
public code. The paper itself could not be read; RECONSTRUCTED from its abstract and from public
reading notes that give the formulae. With the share p_k of images that frozen CLIP takes for class
k, C classes S, and the m classes S_obs that occur,

    G = (1 - sum_k p_k^2) / (1 - 1 / C)                 Gini, normalised
    E = -sum_k p_k log p_k / log C                      entropy, normalised
    R = 1 - m sum over S_obs of (p_k - 1 / m)^2         regularity: 1 - D / D_max, D_max = 1 / m
    M = (G E)^(1 - f) R^f                               f = m / (m + C)
    psi = M - stability M_ideal                         M_ideal: M for p_k = 1 / m, where R = 1

psi > 0 says that the images look like those that a model for diverse data was trained on, and
psi < 0 that they look like those of a special client.

Ours: R is at least 0, because D can exceed 1 / m (the largest D is 1 - 1 / m), and a negative
number has no power f. With a single class M, M_ideal and psi are 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STABILITY = 0.9
"""The paper's factor of M_ideal."""


def alignment(counts_C: NDArray[np.int64]) -> float:
    """M of a histogram of pseudo-labels.

    Args:
        counts_C: images that were taken for each of C >= 2 classes; at least one image.
    """
    classes, observed = len(counts_C), counts_C[counts_C > 0]
    share, m = observed / observed.sum(), len(observed)
    gini = (1 - (share**2).sum()) / (1 - 1 / classes)
    entropy = -(share * np.log(share)).sum() / np.log(classes)
    regularity = max(0.0, 1 - m * ((share - 1 / m) ** 2).sum())
    weight = m / (m + classes)
    return float(max(0.0, gini * entropy) ** (1 - weight) * regularity**weight)


def signal(counts_C: NDArray[np.int64], stability: float = STABILITY) -> float:
    """psi of a histogram of pseudo-labels.

    Args:
        counts_C: as in `alignment`.
        stability: the factor of M_ideal.
    """
    return alignment(counts_C) - stability * alignment((counts_C > 0).astype(np.int64))
