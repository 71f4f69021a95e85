"""Regions of images that do not show the image's class, for methods that learn from them.

Source: LoCoOp (Miyai et al., NeurIPS 2023): a region shows the label if it is among its K best
classes.

Suffixes: K clients, B images, P regions, C classes.
"""

from __future__ import annotations

import math

from torch import Tensor

from fedprompt.methods.batch import Batch


def best_classes(share: float, classes: int) -> int:
    """The number of best classes K, as a share of the classes and fewer than all of them."""
    # 0.2 * 45 is 9.000000000000002; rounding keeps K at 9. With K = C, no region would be left.
    return min(math.ceil(round(share * classes, 9)), classes - 1)


def without_label(scores_KBPC: Tensor, batch: Batch, top_k: int) -> Tensor:
    """1 for regions of images for which the label is not among the K best classes (K, B, P).

    Args:
        scores_KBPC: scores of the regions, the higher the better.
        batch: labels, and which rows are images.
        top_k: K.
    """
    own_KBP1 = scores_KBPC.take_along_dim(batch.labels_KB[:, :, None, None], dim=-1)
    # The label is among the K best if fewer than K classes have a higher score.
    outside_KBP = (scores_KBPC > own_KBP1).sum(-1) >= top_k
    return (outside_KBP & batch.mask_KB[:, :, None]).to(scores_KBPC.dtype)
