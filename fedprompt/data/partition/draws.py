"""Random draws that several partition schemes share.

Suffixes: M images in their random order, K clients, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedprompt.config.schema import PartitionConfig
from fedprompt.errors import UserError

Indices = NDArray[np.int64]
Shares = NDArray[np.float64]
DRAWS = 11
"""Dirichlet draws before clients are topped up; flwr-datasets tries as many."""
log = logging.getLogger(__name__)


def runs(count: int, owners: Indices) -> Indices:
    """Owners of `count` images, one owner after the other, with as many each (within 1)."""
    return owners[np.arange(count) * len(owners) // count]


def draw_shares(rng: np.random.Generator, count: int, alpha: float) -> Shares:
    """Shares ~ Dir(alpha) of `count` cells; they add up to 1.

    Raises:
        UserError: alpha is so small that no shares can be drawn in floating point.
    """
    shares = rng.dirichlet(np.full(count, alpha))
    if not np.isfinite(shares).all():
        raise UserError(f"partition: no shares can be drawn at alpha {alpha}.")
    return shares


def apportion(shares: Shares, total: int) -> Indices:
    """Whole numbers in proportion to `shares` that add up to `total` (largest remainders)."""
    exact = shares * total
    sizes = np.floor(exact).astype(np.int64)
    most = np.argsort(sizes - exact, kind="stable")
    sizes[most[: total - sizes.sum()]] += 1
    return sizes


def draw_counts(rng: np.random.Generator, total: int, shares: Shares, left: Indices) -> Indices:
    """Draw `total` images from cells in proportion to `shares`, without replacement.

    Args:
        rng: the generator.
        total: number of images to draw; there must be as many left.
        shares: probability of each cell.
        left: images left in each cell. A cell without any is not drawn again.

    Returns:
        The number of images drawn from each cell.
    """
    taken = np.zeros_like(left)
    while (missing := total - taken.sum()) > 0:
        room = left - taken
        odds = np.where(room > 0, shares, 0.0)
        if odds.sum() == 0:  # every share that is left is zero in floating point
            odds = room.astype(np.float64)
        taken += np.minimum(rng.multinomial(missing, odds / odds.sum()), room)
    return taken


def label_skew(
    labels_M: Indices, clients: int, config: PartitionConfig, rng: np.random.Generator
) -> Indices:
    """The client (M,) of every image; per class, shares over `clients` are ~ Dir(alpha)."""
    members_C = [np.flatnonzero(labels_M == label) for label in np.unique(labels_M)]

    def draw() -> Indices:
        owner_M = np.empty(len(labels_M), dtype=np.int64)
        for members in members_C:
            shares_K = draw_shares(rng, clients, config.alpha)
            cuts = (np.cumsum(shares_K)[:-1] * len(members)).astype(np.int64)
            bounds = np.concatenate(([0], np.minimum(cuts, len(members)), [len(members)]))
            owner_M[members] = np.repeat(np.arange(clients), np.diff(bounds))
        return owner_M

    return enough_for_all(draw, clients, config)


def enough_for_all(draw: Callable[[], Indices], clients: int, config: PartitionConfig) -> Indices:
    """The first of `DRAWS` draws in which every client has `min_images` images.

    If there is none, clients of the last draw are topped up from the largest ones, with a warning:
    otherwise a run with many clients and a small alpha would be impossible.
    """
    for _ in range(DRAWS):
        owner_M = draw()
        if np.bincount(owner_M, minlength=clients).min() >= config.min_images:
            return owner_M
    return _top_up(owner_M, clients, config)


def _top_up(owner_M: Indices, clients: int, config: PartitionConfig) -> Indices:
    """Give every client `min_images` by moving random images from whoever then holds most."""
    sizes_K = np.bincount(owner_M, minlength=clients)
    grouped = np.argsort(owner_M, kind="stable")
    starts_K = np.cumsum(sizes_K) - sizes_K
    short = np.repeat(np.arange(clients), np.maximum(config.min_images - sizes_K, 0))
    for client in short:
        donor = sizes_K.argmax()
        sizes_K[donor] -= 1
        owner_M[grouped[starts_K[donor] + sizes_K[donor]]] = client
        sizes_K[client] += 1
    log.warning(
        "partition: %d of %d clients were short of %d images after %d Dirichlet draws at alpha "
        "%g; %d images were moved to them from the largest clients",
        len(np.unique(short)),
        clients,
        config.min_images,
        DRAWS,
        config.alpha,
        len(short),
    )
    return owner_M
