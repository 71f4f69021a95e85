"""Membership inference on a model's logits: a threshold on the loss, and LiRA.

Sources: Privacy Risk in Machine Learning (Yeom et al., CSF 2018, arXiv 1709.01604) for the loss;
Membership Inference Attacks From First Principles (Carlini et al., S&P 2022, arXiv 2112.03570) for
LiRA, the likelihood ratio of an image's confidence under models that were and were not trained on
it. How we differ: their code has one variance for all images when shadows are few; ours is the mean
over images of the variance among an image's own shadows.

Shape suffixes: N images, C classes, S shadows.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.evaluation.metrics import auroc, tpr_at_fpr

Floats = NDArray[np.float64]
SMALLEST_STD = 1e-8
"""Shadows may agree to the last bit, as where nothing is learned from an image."""


def margins(logits_NC: Tensor, labels_N: Tensor) -> Floats:
    """The logit of the probability of each image's class, log(p / (1 - p)), (N,).

    The negated cross-entropy is a monotone function of it.
    """
    logits_NC = logits_NC.double()
    own_NC = torch.nn.functional.one_hot(labels_N, logits_NC.shape[1]).bool()
    others_NC = logits_NC.masked_fill(own_NC, -torch.inf)
    found_N: Floats = (logits_NC[own_NC] - others_NC.logsumexp(-1)).numpy()
    return found_N


def likelihood_ratios(target_N: Floats, shadows_SN: Floats, inside_SN: NDArray[np.bool_]) -> Floats:
    """LiRA's log-likelihood ratio of each image, with normal distributions: higher for members.

    Args:
        target_N: margins under the attacked model.
        shadows_SN: margins under the shadow models.
        inside_SN: which shadow was trained on which image; each image is in two or more of them,
            and outside two or more.

    Returns:
        The ratios (N,).
    """
    ratio_N = np.zeros(len(target_N))
    for mask_SN, sign in ((inside_SN, 1), (~inside_SN, -1)):
        count_N = mask_SN.sum(0)
        mean_N = (shadows_SN * mask_SN).sum(0) / count_N
        squares_N = (((shadows_SN - mean_N) * mask_SN) ** 2).sum(0)
        # One variance for all images: that of a few shadows alone would be too uncertain.
        std = max(float(np.sqrt((squares_N / (count_N - 1)).mean())), SMALLEST_STD)
        ratio_N += sign * (-np.log(std) - (target_N - mean_N) ** 2 / (2 * std**2))
    return ratio_N


def success(scores_N: Floats, member_N: NDArray[np.bool_]) -> dict[str, float] | None:
    """Area under the ROC, and the true positive rate at a false positive rate of 1 %.

    Args:
        scores_N: higher where the attacker suspects a member.
        member_N: whether the image is one; there are some and some others.

    Returns:
        `auc` and `tpr`; None if a model has diverged, so that a score is not finite.
    """
    if not np.isfinite(scores_N).all():
        return None
    members, others = scores_N[member_N], scores_N[~member_N]
    return {"auc": auroc(members, others), "tpr": tpr_at_fpr(members, others)}
