"""The contrast of images and texts for several sets of texts at once, in few kernels.

It computes what `alignment.image_text_contrast` does, averaged over the sets, with a third of its
operations, in another order: equal up to float rounding (`tests/methods/parts/test_contrast.py`).
FedRSCLIP uses it on GPUs, where the number of operations is what a step costs; on CPUs the bits of
earlier results are kept.

Shape suffixes: K clients, B images of a batch, C classes, R sets of texts, D joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedprompt.methods.batch import Batch


def mean_image_text_contrast(
    images_KBD: Tensor, sets: Sequence[Tensor], batch: Batch, temperature: float
) -> Tensor:
    """Mean over sets of the symmetric InfoNCE over the image-text pairs of a batch.

    Args:
        images_KBD: L2-normalised image features.
        sets: R times L2-normalised class features (K, C, D).
        batch: labels and mask of the step.
        temperature: divides the cosines.

    Returns:
        Losses (K,).
    """
    classes = sets[0].shape[1]
    share_KBB, hidden_KBB = _weights(batch, len(sets))
    numbers_C = torch.arange(classes, device=images_KBD.device)
    one_hot_KBC = (batch.labels_KB[..., None] == numbers_C) * (1 / temperature)
    # Products with all classes come first: (K, B, R * C) needs one matrix product per client.
    cosine_KBRC = (images_KBD @ torch.cat(list(sets), dim=1).transpose(-1, -2)).unflatten(
        -1, (len(sets), classes)
    )
    # Of image i, set r and the text of image j.
    logits_KBRB = (cosine_KBRC.flatten(1, 2) @ one_hot_KBC.transpose(-1, -2)).view(
        *cosine_KBRC.shape[:3], -1
    )
    # A finite number, which the shares of zero still cancel. No exponential is left of it.
    lowest = torch.finfo(logits_KBRB.dtype).min / 2
    blocked = logits_KBRB.masked_fill(hidden_KBB[:, :, None], lowest)
    there = blocked.log_softmax(-1) * share_KBB[:, :, None]
    back = blocked.log_softmax(1) * share_KBB.transpose(-1, -2)[:, :, None]
    loss_K: Tensor = (there + back).sum((1, 2, 3))
    return loss_K


@torch.no_grad()
def _weights(batch: Batch, sets: int) -> tuple[Tensor, Tensor]:
    """The weight of each pair's log-probability, and which pairs contain padding: (K, B, B).

    Anchors count equally, and so do the positives of an anchor, both directions and all sets.
    """
    mask_KB, labels_KB = batch.mask_KB, batch.labels_KB
    real_KBB = mask_KB[:, :, None] & mask_KB[:, None, :]
    positive_KBB = (labels_KB[:, :, None] == labels_KB[:, None, :]) & real_KBB
    # A padding row has no positive; its weight is 0 / 1.
    positives_KB1 = positive_KBB.sum(-1, keepdim=True).clamp(min=1)
    anchors_K11 = mask_KB.sum(-1)[:, None, None]
    return positive_KBB / (positives_KB1 * anchors_K11 * (-2 * sets)), ~real_KBB
