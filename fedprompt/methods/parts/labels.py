"""Picks the rows of a table by class labels, with a gradient whose sum has a fixed order.

Indexing would do the same. Its gradient, however, adds the rows of images with equal labels, and
CUDA adds them in whichever order its threads arrive, so that the last bits differ from run to run.
A matrix product with one-hot rows has no such freedom, and its cost is negligible.

Shape suffixes: K clients, B images of a batch, C classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def one_hot(labels_KB: Tensor, table: Tensor) -> Tensor:
    """One-hot rows (K, B, C) of labels, of a table's type.

    Args:
        labels_KB: class indices.
        table: values per class, (..., C, n), from which C and the type are taken.
    """
    return F.one_hot(labels_KB, table.shape[-2]).to(table.dtype)


def rows_of(labels_KB: Tensor, table_KCn: Tensor) -> Tensor:
    """The row of each image's class: (K, B, n).

    Args:
        labels_KB: class indices.
        table_KCn: one row per class, finite.
    """
    return one_hot(labels_KB, table_KCn) @ table_KCn
