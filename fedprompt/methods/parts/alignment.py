"""Loss terms that pull features together; FedRSCLIP builds its two constraints from them.

Features are L2-normalised, so a product of two is their cosine. Shape suffixes: K clients, N rows
(classes or images), B images of a batch, C classes, D joint embedding. A mask is false on padding;
a mask of None means that all rows count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedprompt.methods.base import Batch
from fedprompt.methods.parts.labels import rows_of
from fedprompt.methods.parts.losses import masked_mean


def pair_distance(a_KND: Tensor, b_KND: Tensor, mask_KN: Tensor | None) -> Tensor:
    """Cosine distance 1 - mean_n cos(a_n, b_n).

    Args:
        a_KND: L2-normalised rows.
        b_KND: L2-normalised rows; row n belongs to row n of `a_KND`.
        mask_KN: false on padding, or None.

    Returns:
        Distances (K,), in [0, 2].
    """
    cosine_KN = (a_KND * b_KND).sum(-1)
    return 1 - (cosine_KN.mean(-1) if mask_KN is None else masked_mean(cosine_KN, mask_KN))


def pair_contrast(
    a_KND: Tensor, b_KND: Tensor, mask_KN: Tensor | None, temperature: float
) -> Tensor:
    """Symmetric InfoNCE with positives (a_n, b_n); every other row is a negative.

    Args:
        a_KND: L2-normalised rows.
        b_KND: L2-normalised rows; row n belongs to row n of `a_KND`.
        mask_KN: false on padding, or None.
        temperature: divides the cosines.

    Returns:
        Losses (K,).
    """
    similarity_KNN = a_KND @ b_KND.transpose(-1, -2) / temperature
    if mask_KN is None:
        # Every row is real and has one positive, so the diagonal alone is needed.
        there = similarity_KNN.log_softmax(-1).diagonal(dim1=-2, dim2=-1).mean(-1)
        back = similarity_KNN.log_softmax(-2).diagonal(dim1=-2, dim2=-1).mean(-1)
        return -(there + back) / 2
    own_NN = torch.eye(mask_KN.shape[-1], dtype=torch.bool, device=mask_KN.device)
    return _both_ways(similarity_KNN, own_NN, mask_KN)


def divergence(logits_s_KBC: Tensor, logits_p_KBC: Tensor, mask_KB: Tensor) -> Tensor:
    """Mean over images of KL(softmax s || softmax p).

    Args:
        logits_s_KBC: logits of the reference distribution.
        logits_p_KBC: logits of the distribution that is compared with it.
        mask_KB: false on padding.

    Returns:
        Divergences (K,) in nats. They are not divided by the number of classes, so their weight
        does not depend on the length of the class list.
    """
    log_s, log_p = logits_s_KBC.log_softmax(-1), logits_p_KBC.log_softmax(-1)
    return masked_mean((log_s.exp() * (log_s - log_p)).sum(-1), mask_KB)


def image_text_distance(images_KBD: Tensor, classes_KCD: Tensor, batch: Batch) -> Tensor:
    """1 - mean cosine of each image and the text of its class.

    Args:
        images_KBD: L2-normalised image features.
        classes_KCD: L2-normalised class features.
        batch: labels and mask of the step.

    Returns:
        Distances (K,).
    """
    return pair_distance(images_KBD, rows_of(batch.labels_KB, classes_KCD), batch.mask_KB)


def image_text_contrast(
    images_KBD: Tensor, classes_KCD: Tensor, batch: Batch, temperature: float
) -> Tensor:
    """Symmetric InfoNCE over the image-text pairs of a batch.

    All pairs of one class are positives of each other. With the diagonal as the only positives,
    images would be pushed away from the text of their class whenever a class repeats in the batch.

    Args:
        images_KBD: L2-normalised image features.
        classes_KCD: L2-normalised class features.
        batch: labels and mask of the step.
        temperature: divides the cosines.

    Returns:
        Losses (K,).
    """
    texts_KBD = rows_of(batch.labels_KB, classes_KCD)
    logits_KBB = images_KBD @ texts_KBD.transpose(-1, -2) / temperature
    same_KBB = batch.labels_KB[:, :, None] == batch.labels_KB[:, None, :]
    return _both_ways(logits_KBB, same_KBB, batch.mask_KB)


def _both_ways(logits_KNN: Tensor, positive: Tensor, mask_KN: Tensor) -> Tensor:
    """Mean of the losses over rows and over columns (K,); `positive` is (N, N) or (K, N, N)."""
    positive_KNN = positive & mask_KN[:, :, None] & mask_KN[:, None, :]
    there = _multi_positive(logits_KNN, positive_KNN, mask_KN)
    back = _multi_positive(logits_KNN.transpose(-1, -2), positive_KNN, mask_KN)
    return (there + back) / 2


def _multi_positive(logits_KNN: Tensor, positive_KNN: Tensor, mask_KN: Tensor) -> Tensor:
    """Mean over anchors of the mean over positives of -log softmax (SupCon's outer form): (K,)."""
    # Minus infinity removes padding columns from the denominators. Log-probabilities of pairs that
    # are not positives are then set to 0 rather than multiplied by 0, because 0 * -inf is NaN.
    blocked = logits_KNN.masked_fill(~mask_KN[:, None, :], float("-inf"))
    log_p = blocked.log_softmax(-1).masked_fill(~positive_KNN, 0.0)
    # A padding row has no positive; the mask removes it from the mean.
    positives_KN = positive_KNN.sum(-1).clamp(min=1)
    return masked_mean(-log_p.sum(-1) / positives_KN, mask_KN)
