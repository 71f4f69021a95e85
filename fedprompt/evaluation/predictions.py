"""Which images of a test set a model classifies correctly, and counts of them by group.

Protocols call it on the server and on the clients' side.

Shape suffixes: N images, G groups.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.backbone.memo import Memo
from fedprompt.data.features.inputs import Inputs
from fedprompt.evaluation.metrics import Ints
from fedprompt.methods.base import Method, Tensors
from fedprompt.scoring import logits_of


def hits(
    method: Method, encoded: Tensors, inputs_N: Inputs, labels_N: Tensor, memo: Memo | None = None
) -> NDArray[np.bool_]:
    """Which images one encoded model classifies correctly (N,).

    Args:
        method: the method.
        encoded: the model, with client axis 1.
        inputs_N: the images (N, ...).
        labels_N: their class indices (N,).
        memo: as in `fedprompt.scoring.logits_of`.
    """
    best = [logits.argmax(-1) for logits in logits_of(method, encoded, inputs_N, memo)]
    found: NDArray[np.bool_] = (torch.cat([labels_N[:0], *best]) == labels_N).numpy()
    return found


def by_group(hits_N: NDArray[np.bool_], group_N: Ints, groups: int) -> tuple[Ints, Ints]:
    """Numbers of images and of correctly classified ones in each group, (G,) each.

    Args:
        hits_N: which images are classified correctly.
        group_N: the group of each image, 0 .. G - 1.
        groups: number of groups G.
    """
    tested_G = np.bincount(group_N, minlength=groups).astype(np.int64)
    correct_G = np.bincount(group_N[hits_N], minlength=groups).astype(np.int64)
    return tested_G, correct_G


def shares(correct_G: Ints, tested_G: Ints) -> list[float | None]:
    """Accuracy of each group; None for a group without images."""
    pairs = zip(correct_G.tolist(), tested_G.tolist(), strict=True)
    return [hit / images if images else None for hit, images in pairs]
