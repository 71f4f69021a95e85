"""A round's updates as rows of one matrix, in float64: U updates, P numbers of all shared tensors.

Rows are in the order of client ids and columns in that of the shared tensors, so that no result
depends on which client replies first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedprompt.federation.screening import Update
from fedprompt.messages import Arrays

Rows = NDArray[np.float64]
"""A float64 array; its suffix gives the axes."""


def flat(shared: Arrays, arrays: Arrays) -> Rows:
    """The tensors of `arrays` one after the other, in the order of `shared`: (P,)."""
    parts = [np.asarray(arrays[name], dtype=np.float64).ravel() for name in shared]
    return np.concatenate(parts) if parts else np.zeros(0)


def changes(shared: Arrays, updates: Sequence[Update]) -> Rows:
    """What every client's training adds to the shared tensors: (U, P)."""
    # In float64: between prompts that differ little, most digits of float32 cancel.
    start_P = flat(shared, shared)
    # In a round without updates there are no rows, but still P columns.
    rows = [flat(shared, u.arrays) for u in updates]
    return np.stack(rows) - start_P if rows else np.zeros((0, start_P.size))


def sample_shares(updates: Sequence[Update]) -> Rows:
    """Every client's share of the round's training images: (U,), sum 1."""
    images = np.array([u.num_examples for u in updates], dtype=np.float64)
    return np.asarray(images / images.sum())


def combined(weights_U: Rows, rows_UP: Rows) -> Rows:
    """The weighted sum of rows: (P,)."""
    # Not a matrix product: the order of its additions depends on the processor.
    return np.asarray((weights_U[:, None] * rows_UP).sum(axis=0))


def unflat(shared: Arrays, numbers_P: Rows) -> Arrays:
    """Float64 tensors with the names and shapes of `shared`, the reverse of `flat`."""
    tensors, first = {}, 0
    for name, last in shared.items():
        tensors[name] = numbers_P[first : first + last.size].reshape(last.shape)
        first += last.size
    return tensors


def moved(shared: Arrays, step_P: Rows) -> Arrays:
    """The shared tensors after a step, float32."""
    after = unflat(shared, flat(shared, shared) + step_P)
    return {name: values.astype(np.float32) for name, values in after.items()}


def norms(rows_UP: Rows) -> Rows:
    """L2 norm of every row: (U,)."""
    return np.asarray(np.sqrt((rows_UP**2).sum(axis=1)))


def units(rows_UP: Rows) -> Rows:
    """Rows scaled to L2 norm 1; a row of zeros stays zero."""
    length_U = norms(rows_UP)
    return rows_UP / np.where(length_U > 0, length_U, 1.0)[:, None]


def clipped(rows_UP: Rows, bound: float) -> Rows:
    """Rows scaled down to L2 norm `bound` if they are longer; their directions stay."""
    length_U = norms(rows_UP)
    scale_U = np.minimum(1.0, bound / np.where(length_U > 0, length_U, 1.0))
    return rows_UP * scale_U[:, None]


def count_of(share: float, clients: int) -> int:
    """A share of `clients` as a number of them, rounded down."""
    # 0.29 * 100 is slightly less than 29 in floating point.
    return int(share * clients + 1e-9)


def distances(rows_UP: Rows) -> Rows:
    """Squared L2 distances between all rows, (U, U); exactly 0 from a row to itself."""
    squares_U = (rows_UP**2).sum(axis=1)
    distance_UU = squares_U[:, None] + squares_U[None, :] - 2 * rows_UP @ rows_UP.T
    # Rounding leaves errors on the diagonal and can make small distances negative.
    np.fill_diagonal(distance_UU, 0)
    return np.asarray(np.maximum(distance_UU, 0))
