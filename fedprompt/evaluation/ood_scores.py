"""Scores that say how likely an image is of a known class, from a method's logits.

The higher a score, the more likely is a known class. CLIP's logits are cosines divided by CLIP's
temperature of about 0.01; methods with another kind of logits have scores that are of use only
where they depend on the order of images.

- MSP (A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural Networks,
  Hendrycks and Gimpel, ICLR 2017, arXiv 1610.02136): the highest softmax probability of the logits.
- MCM (Delving into Out-of-Distribution Detection with Vision-Language Representations, Ming et al.,
  NeurIPS 2022, arXiv 2211.13445): the same of the cosines, at temperature 1.
- Energy (Energy-based Out-of-distribution Detection, Liu et al., NeurIPS 2020, arXiv 2010.03759):
  log sum_c exp(logit_c), the negative free energy at temperature 1.
- NegLabel (Jiang et al., ICLR 2024, arXiv 2403.20078): with words W that are far from all class
  names (`fedprompt.backbone.negative_words`) and their logits n_w = v . t_w / tau of CLIP,

      S = sum_c exp(logit_c) / (sum_c exp(logit_c) + sum_w exp(n_w)),

  averaged over groups of about 100 words. The authors draw the groups at random; ours take every
  G-th word, so that all groups lie equally far away.

Shape suffixes: N images, C classes, W words, D joint embedding.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedprompt.data.features.inputs import Inputs
from fedprompt.evaluation.metrics import Floats
from fedprompt.methods.base import Method, Tensors

GROUP = 100
"""Words of a group of NegLabel, as in the authors' code (100 groups of 10,000 words)."""


def highest_probability(logits_NC: Tensor, scale: float = 1.0) -> Floats:
    """MSP (N,) of logits; MCM if `scale` turns them into cosines divided by its temperature.

    Args:
        logits_NC: logits, for CLIP cosines times its logit scale.
        scale: what the logits are divided by.
    """
    found: Floats = (logits_NC.cpu().double() / scale).softmax(-1).amax(-1).numpy()
    return found


def energy(logits_NC: Tensor) -> Floats:
    """The negative free energy (N,) of logits."""
    found: Floats = logits_NC.cpu().double().logsumexp(-1).numpy()
    return found


def neg_label(logits_NC: Tensor, negative_NW: Tensor) -> Floats:
    """NegLabel (N,).

    Args:
        logits_NC: logits of the class names.
        negative_NW: logits of the negative words, on the same scale.
    """
    known_N = logits_NC.cpu().double().logsumexp(-1)
    negative_NW = negative_NW.cpu().double()
    groups = max(1, negative_NW.shape[1] // GROUP)
    # a / (a + b) is the sigmoid of log a - log b.
    shares = [
        torch.sigmoid(known_N - negative_NW[:, g::groups].logsumexp(-1)) for g in range(groups)
    ]
    found: Floats = torch.stack(shares).mean(0).numpy()
    return found


@torch.no_grad()
def novelty_head(method: Method, encoded: Tensors, inputs_N: Inputs) -> dict[str, Floats]:
    """The method's own score (n,), higher for known images; empty if it has none."""
    found = []
    for first in range(0, len(inputs_N), method.images_at_once):
        some = inputs_N[first : first + method.images_at_once].of_one().on(method.clip.device)
        novelty_1B = method.novelty(encoded, some)
        if novelty_1B is None:
            return {}
        found.append(-novelty_1B[0].cpu().double().numpy())
    return {"novelty head": np.concatenate(found)}
