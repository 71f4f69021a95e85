"""Moments of a client's image features: all that closed-form methods learn from.

They are means over images, so every strategy that averages by images gives those of all images
together, whatever the partition; and no norm exceeds 1, whatever the number of images.

Suffixes: N images in all their views, C classes, D joint embedding, T = D (D + 1) / 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.methods.base import ClientData


class Moments(NamedTuple):
    """Means over images, float64, on the CPU.

    Attributes:
        gram_T: x x^T, its upper triangle row by row.
        targets_CD: y x^T, with y the one-hot label.
        shares_C: y, the share of each class.
    """

    gram_T: Tensor
    targets_CD: Tensor
    shares_C: Tensor


def moments(data: ClientData, classes: int) -> Moments:
    """The moments of a client's labelled images in all their views.

    Args:
        data: the client's images.
        classes: C.
    """
    x_ND = data.inputs.features.cpu().double()
    y_NC = F.one_hot(data.labels_N.cpu().repeat(data.views), classes).to(x_ND)
    upper = torch.triu_indices(*2 * [x_ND.shape[1]])
    gram_DD, targets_CD = x_ND.T @ x_ND / len(x_ND), y_NC.T @ x_ND / len(x_ND)
    return Moments(gram_DD[upper[0], upper[1]], targets_CD, y_NC.mean(0))


def symmetric(upper: Tensor, width: int) -> Tensor:
    """The matrices (..., D, D) with the given upper triangles (..., T).

    Args:
        upper: the triangles, row by row.
        width: D.
    """
    rows, columns = torch.triu_indices(width, width)
    matrix = upper.new_zeros(*upper.shape[:-1], width, width)
    matrix[..., rows, columns] = upper
    return matrix + matrix.triu(1).transpose(-1, -2)


def nonnegative(matrix_DD: Tensor, tolerance: float) -> Tensor:
    """A symmetric matrix without its negative eigenvalues.

    Moments have none, but noise may have given them some. The matrix is returned as it is if no
    eigenvalue is below -`tolerance`.
    """
    identity_DD = torch.eye(len(matrix_DD), dtype=matrix_DD.dtype)
    if not torch.linalg.cholesky_ex(matrix_DD + tolerance * identity_DD).info:
        return matrix_DD
    values_D, vectors_DD = torch.linalg.eigh(matrix_DD)
    cleared_DD: Tensor = (vectors_DD * values_D.clamp(min=0)) @ vectors_DD.T
    return cleared_DD
