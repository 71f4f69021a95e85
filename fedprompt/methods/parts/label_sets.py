"""The multi-label task: from a method's class logits to the logits of labels, and their loss.

Whether an image has label c is a question of its own, which a softmax over classes cannot answer.
DualCoOp (Sun, Hu and Saenko, NeurIPS 2022, arXiv 2206.09541) learns a positive and a negative
prompt per label and takes the softmax over the two,

    p_c = exp(s v.t_c) / (exp(s v.t_c) + exp(s v.n_c)) = sigmoid(s v.t_c - s v.n_c)

with s CLIP's logit scale. FedMPT (CVPR 2026) trains such pairs, and plain scaled cosines, in
federations. Here t_c are the class features of whatever method is trained, and one negative serves
all labels, frozen: the mean over labels of CLIP's own class features,

    z_c = s v.t_c - s v.n - log(C - 1),   n = (1 / C) sum_c' t0_c'

so that s v.n is the image's mean zero-shot logit. The constant makes a label as likely as one of C
where nothing speaks for it or against it, as focal losses start (Lin et al., ICCV 2017, section
4.1): without it, half of all labels are present at the start, and prompts spend their training on
that. It ranks no image differently. PositiveCoOp (Rawlekar et al., WACV 2025, arXiv
2409.08381) finds that negative prompts learned through the text tower do not help. Without n, all
s v.t_c are large and positive on CLIP, and each sigmoid is 1. A method needs nothing of its own:
its `logits` stay s v.t_c, also where v or t_c are prompted or adapted; v.n takes the frozen v.

The loss is the asymmetric one of Ridnik et al. (ICCV 2021, arXiv 2009.14119), with p = sigmoid(z):

    L = - sum over present c of (1 - p_c)^gamma_pos log p_c
        - sum over absent c of  q_c^gamma_neg log(1 - q_c),   q_c = max(p_c - clip, 0)

`bce` is the same without exponents and clip. As in the public code, no gradient passes through the
weights. How we differ: the loss is a sum over labels and a mean over images, there a sum over both;
logarithms are not clamped at 1e-6, below which a badly missed label would have no gradient.

Suffixes: K clients, B images of a batch, C labels, D joint embedding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.multi_label import MultiLabelConfig
from fedprompt.methods.batch import Task


@torch.no_grad()
def frozen_negative(clip: FrozenCLIP, task: Task) -> Tensor:
    """n (D,), the mean over labels of CLIP's own class features; it is not normalised again."""
    return clip.zero_shot_classifier(task.class_names, task.templates).mean(0)


def against(clip: FrozenCLIP, logits_KBC: Tensor, v_KBD: Tensor, negative_D: Tensor) -> Tensor:
    """z (K, B, C): class logits minus the logit of the negative and the logarithm of C - 1.

    Args:
        clip: the frozen backbone, for its logit scale.
        logits_KBC: a method's class logits.
        v_KBD: frozen image features; a client axis of 1 broadcasts.
        negative_D: the result of `frozen_negative`.
    """
    prior = math.log(logits_KBC.shape[-1] - 1)
    return logits_KBC - clip.logit_scale * (v_KBD @ negative_D)[..., None] - prior


def label_set_loss(z_KBC: Tensor, targets_KBC: Tensor, options: MultiLabelConfig) -> Tensor:
    """Loss of each image (K, B), summed over labels.

    Args:
        z_KBC: logits of labels.
        targets_KBC: 1 for the labels that an image has, else 0.
        options: which loss, and its exponents.
    """
    present_KBC = targets_KBC > 0.5
    # log sigmoid(-z) is log(1 - p), also where 1 - p itself is 0 in float32.
    log_absent_KBC = F.logsigmoid(-z_KBC)
    if options.loss == "bce":
        return -torch.where(present_KBC, F.logsigmoid(z_KBC), log_absent_KBC).sum(-1)
    p_KBC = torch.sigmoid(z_KBC)
    if options.clip > 0:
        # min(1 - p + clip, 1) = 1 - max(p - clip, 0).
        log_absent_KBC = torch.log((torch.sigmoid(-z_KBC) + options.clip).clamp(max=1))
    log_KBC = torch.where(present_KBC, F.logsigmoid(z_KBC), log_absent_KBC)
    with torch.no_grad():
        q_KBC = (p_KBC - options.clip).clamp(min=0)
        weight_KBC = torch.where(
            present_KBC, (1 - p_KBC) ** options.gamma_pos, q_KBC**options.gamma_neg
        )
    return -(weight_KBC * log_KBC).sum(-1)
