"""A memory of a client's unlabelled images, with the classes that zero-shot CLIP gives them.

TFUP reads it in `logits`; TFUP-T takes the pseudo-labels of its training from it.

Source: Training-Free Unsupervised Prompt for Vision-Language Models (Long et al., 2024, arXiv
2404.16339; public code wlb12345/TFUP at d95d4d3). With p(v) = softmax(10 v . t), a class keeps, of
the 2k images with the highest p_c, the k with the smallest sum_j KL(p(i) || p(j)) over these 2k,
which are the most typical ones. The memory votes for the class of its rows F,

    votes_c(v) = sum_{rows of c} exp(-beta (1 - (v . F) sim(v, F)))
    sim(v, F) = 2 (1 - minmax_F(KL(p(v) || p(F))))

The code standardises the divergences before minmax, which cancels.

The rows are features of raw images, so a memory is private. An image may be in the memory of
several classes. No label is read.

Suffixes: K clients, B images of a batch, N images of a client, M rows of a memory, C classes, D
joint embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedprompt.methods.parts.feature_memory import vote

SHARPNESS = 10.0
"""The scale of cosines behind p(v), both papers' and code's."""


def confident(features_ND: Tensor, classes_CD: Tensor, shots: int) -> tuple[Tensor, Tensor]:
    """The images that each class keeps.

    Args:
        features_ND: L2-normalised image features.
        classes_CD: L2-normalised class features.
        shots: k.

    Returns:
        Rows of `features_ND`, and the class of each: both (C min(N, k),), by class and, within a
        class, the most typical image first.
    """
    log_p_NC = _log_p(features_ND, classes_CD)
    rows = []
    for log_p_N in log_p_NC.unbind(-1):
        # Stable, so that equal images are kept in their order on every machine.
        top = log_p_N.argsort(descending=True, stable=True)[: 2 * shots]
        log_p_MC = log_p_NC[top].double()
        divergence_M = (log_p_MC.exp() * (log_p_MC - log_p_MC.mean(0))).sum(-1)
        rows.append(top[divergence_M.argsort(stable=True)[:shots]])
    classes = torch.arange(log_p_NC.shape[-1], device=features_ND.device)
    return torch.cat(rows), classes.repeat_interleave(len(rows[0]))


def similar_votes(
    features_KBD: Tensor,
    keys_KMD: Tensor,
    owners_KM: Tensor,
    classes_KCD: Tensor,
    beta: float,
) -> Tensor:
    """The memory's votes, votes_c(v) of the module's docstring.

    Args:
        features_KBD: L2-normalised image features.
        keys_KMD: rows of the memory, L2-normalised.
        owners_KM: 1 + the class of each row; 0 where there is none.
        classes_KCD: L2-normalised class features.
        beta: sharpness.

    Returns:
        Votes (K, B, C), not negative.
    """
    log_p_KBC, log_p_KMC = _log_p(features_KBD, classes_KCD), _log_p(keys_KMD, classes_KCD)
    if not log_p_KMC.shape[-2]:
        return torch.zeros_like(log_p_KBC)
    p_KBC = log_p_KBC.exp()
    entropy_KB1 = (p_KBC * log_p_KBC).sum(-1, keepdim=True)
    divergence_KBM = entropy_KB1 - p_KBC @ log_p_KMC.transpose(-1, -2)
    # Rows of padding must not be the nearest or the farthest.
    there_K1M = owners_KM[:, None] > 0
    low_KB1 = divergence_KBM.masked_fill(~there_K1M, torch.inf).amin(-1, keepdim=True)
    high_KB1 = divergence_KBM.masked_fill(~there_K1M, -torch.inf).amax(-1, keepdim=True)
    # With a single row, or with equal ones, all are as similar as can be.
    spread_KB1 = (high_KB1 - low_KB1).clamp(min=torch.finfo(torch.float32).tiny)
    similar_KBM = 2 * (1 - (divergence_KBM - low_KB1) / spread_KB1)
    affinity_KBM = (features_KBD @ keys_KMD.transpose(-1, -2)) * similar_KBM
    # A client without any row has no lowest divergence, and its NaN would survive the zero weight.
    affinity_KBM = affinity_KBM.masked_fill(~there_K1M, 0)
    return vote(affinity_KBM, owners_KM, beta, classes_KCD.shape[-2])


def _log_p(features: Tensor, classes: Tensor) -> Tensor:
    """log p(v), (..., C)."""
    return (SHARPNESS * (features @ classes.transpose(-1, -2))).log_softmax(-1)
