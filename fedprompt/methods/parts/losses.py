"""CLIP's logits, and losses of K clients whose batches are padded to a common size.

Every method's `logits` and `loss_terms` use them. Losses are means over a client's real images, so
that K clients trained together have the losses of each client trained alone.

Shape suffixes: K clients, B images of a batch, C classes, G experts, D joint embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.methods.batch import Batch


def cosine_logits(clip: FrozenCLIP, features_KBD: Tensor, classes_KCD: Tensor) -> Tensor:
    """CLIP's logits: `clip.logit_scale` times the products of image and class features.

    Args:
        clip: the frozen backbone, for its logit scale.
        features_KBD: image features, L2-normalised unless the method says otherwise.
        classes_KCD: class features, likewise; a client axis of 1 broadcasts on either side.

    Returns:
        Logits (K, B, C).
    """
    return clip.logit_scale * (features_KBD @ classes_KCD.transpose(-1, -2))


def per_image_logits(clip: FrozenCLIP, features_KBD: Tensor, classes_KBCD: Tensor) -> Tensor:
    """CLIP's logits (K, B, C), each image with class features of its own.

    Args:
        clip: the frozen backbone, for its logit scale.
        features_KBD: image features, as in `cosine_logits`.
        classes_KBCD: class features of each image.
    """
    return clip.logit_scale * torch.einsum("kbd,kbcd->kbc", features_KBD, classes_KBCD)


def mixed_logits(
    clip: FrozenCLIP, features_KBD: Tensor, experts_KGCD: Tensor, weight_KBG: Tensor
) -> Tensor:
    """CLIP's logits (K, B, C) with each image's mixture of the class features of G experts.

    Args:
        clip: the frozen backbone, for its logit scale.
        features_KBD: image features, as in `cosine_logits`.
        experts_KGCD: class features of each expert.
        weight_KBG: the weight of each expert for each image; axes of 1 broadcast.
    """
    # The mixture is linear, so the logits of the experts can be mixed.
    each_KBGC = torch.einsum("kbd,kgcd->kbgc", features_KBD, experts_KGCD)
    return clip.logit_scale * (weight_KBG[..., None] * each_KBGC).sum(-2)


def cross_entropy(logits_KBC: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy (K,) of each client over its images, without the padding."""
    # torch's mean would run over all clients and over the padding.
    loss_KB = F.cross_entropy(logits_KBC.flatten(0, 1), batch.labels_KB.flatten(), reduction="none")
    return masked_mean(loss_KB.view_as(batch.mask_KB), batch.mask_KB)


def labelled_cross_entropy(logits_KBC: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy (K,) of each client over its labelled images; 0 where it has none."""
    labelled_KB = batch.labelled_KB
    # An unlabelled image has no class index, so any class takes its place and the mask removes it.
    labels_KB = batch.labels_KB.clamp(min=0)
    loss_KB = F.cross_entropy(logits_KBC.flatten(0, 1), labels_KB.flatten(), reduction="none")
    weight_KB = labelled_KB.to(loss_KB.dtype)
    return (loss_KB.view_as(weight_KB) * weight_KB).sum(-1) / weight_KB.sum(-1).clamp(min=1)


def distillation(logits_KBC: Tensor, teacher_KBC: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy (K,) with a teacher's probabilities as targets.

    It is KL(teacher || student) plus the teacher's entropy, so that its gradient is that of the
    divergence if the teacher is fixed.
    """
    loss_KB = -(teacher_KBC.softmax(-1) * logits_KBC.log_softmax(-1)).sum(-1)
    return masked_mean(loss_KB, batch.mask_KB)


def masked_mean(values_KB: Tensor, mask_KB: Tensor) -> Tensor:
    """Mean (K,) over the images for which the mask is true."""
    weight_KB = mask_KB.to(values_KB.dtype)
    return (values_KB * weight_KB).sum(-1) / weight_KB.sum(-1)
