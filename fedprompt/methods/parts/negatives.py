"""Prompts of words that name no class: extra columns of logits that attract unknown images.

Used by methods that train with negative words (FedLAPT, FOCoOp). An image is classified among the
class names alone; how little it looks like any of them is the probability of the other columns,
which is one minus the score of NegLabel (Jiang et al., ICLR 2024, arXiv 2403.20078).

Shape suffixes: K clients, B images, C classes, E negative words, N = C + E columns, D embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.negative_words import negative_words
from fedprompt.methods.parts.losses import cosine_logits

COUNT = "negatives"
"""The config key that says how many words there are."""


def chosen_words(clip: FrozenCLIP, class_names: tuple[str, ...], count: int) -> tuple[str, ...]:
    """The words, chosen once per method at its first use, since the whole list is encoded for it.

    Raises:
        UserError: the list has fewer words.
    """
    before = clip.positions_encoded
    words = negative_words(clip, class_names, count, COUNT)
    # The first use is a trial step by which the size of blocks of clients is chosen. No other step
    # pays for the choice again.
    clip.positions_encoded = before
    return words


def joint_logits(
    clip: FrozenCLIP, features_KBD: Tensor, classes_KCD: Tensor, negatives_KED: Tensor
) -> Tensor:
    """Logits (K, B, C + E): class names first, then negative words.

    Args:
        clip: the frozen backbone.
        features_KBD: image features.
        classes_KCD: features of the class names; a client axis of 1 broadcasts.
        negatives_KED: features of the negative words, likewise.
    """
    clients = max(len(classes_KCD), len(negatives_KED))
    both = [t.expand(clients, -1, -1) for t in (classes_KCD, negatives_KED)]
    return cosine_logits(clip, features_KBD, torch.cat(both, dim=1))


def share_of_negatives(
    clip: FrozenCLIP, features_KBD: Tensor, classes_KCD: Tensor, negatives_KED: Tensor
) -> Tensor:
    """The probability (K, B) of the negative words; arguments as in `joint_logits`."""
    logits_KBN = joint_logits(clip, features_KBD, classes_KCD, negatives_KED)
    return logits_KBN.softmax(-1)[..., classes_KCD.shape[1] :].sum(-1)
