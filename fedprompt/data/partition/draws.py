"""Random draws and roundings that several partition schemes share.

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
"""Number of Dirichlet draws before small clients are topped up, as in flwr-datasets."""
log = logging.getLogger(__name__)


def runs(count: int, owners: Indices) -> Indices:
    """Return the owners (count,) of consecutive images: one run per owner, sizes equal within 1."""
    return owners[np.arange(count) * len(owners) // count]


def draw_shares(rng: np.random.Generator, count: int, alpha: float) -> Shares:
    """Draw shares (count,) ~ Dir(alpha), which add up to 1.

    Args:
        rng: the scheme's generator.
        count: number of cells, such as clients or classes.
        alpha: concentration, the same for every cell; a small value gives unequal shares.

    Raises:
        UserError: alpha is so small that the shares are not finite in floating point.
    """
    shares = rng.dirichlet(np.full(count, alpha))
    if not np.isfinite(shares).all():
        raise UserError(f"partition: no shares can be drawn at alpha {alpha}.")
    return shares


def apportion(shares: Shares, total: int) -> Indices:
    """Return whole numbers proportional to `shares` that add up to `total` (largest remainders)."""
    exact = shares * total
    sizes = np.floor(exact).astype(np.int64)
    # A stable sort, so that equal remainders are resolved in the same way on every platform.
    most = np.argsort(sizes - exact, kind="stable")
    sizes[most[: total - sizes.sum()]] += 1
    return sizes


def draw_counts(rng: np.random.Generator, total: int, shares: Shares, left: Indices) -> Indices:
    """Draw `total` images from cells in proportion to `shares`, without replacement.

    Args:
        rng: the scheme's generator.
        total: number of images to draw, at most the sum of `left`.
        shares: probability of each cell.
        left: images that remain in each cell. An empty cell is not drawn again.

    Returns:
        The number of images drawn from each cell.
    """
    # A multinomial draw may exceed what a cell holds; the excess is drawn from the other cells.
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
    """Assign every image to a client; each class is divided in shares ~ Dir(alpha).

    Args:
        labels_M: class of each image.
        clients: number of clients, 0 to `clients` - 1. It is not `config.clients` where a scheme
            divides one domain only.
        config: `alpha` and `min_images`.
        rng: the scheme's generator.

    Returns:
        The client (M,) of every image.

    Raises:
        UserError: alpha is too small for floating point.
    """
    members_C = [np.flatnonzero(labels_M == label) for label in np.unique(labels_M)]

    def draw() -> Indices:
        owner_M = np.empty(len(labels_M), dtype=np.int64)
        for members in members_C:
            shares_K = draw_shares(rng, clients, config.alpha)
            # Cut where flwr-datasets cuts (cumulative shares, rounded down): a test compares both
            # image by image. The minimum keeps float noise in the sum from passing the last image.
            cuts = (np.cumsum(shares_K)[:-1] * len(members)).astype(np.int64)
            bounds = np.concatenate(([0], np.minimum(cuts, len(members)), [len(members)]))
            owner_M[members] = np.repeat(np.arange(clients), np.diff(bounds))
        return owner_M

    return enough_for_all(draw, clients, config)


def enough_for_all(draw: Callable[[], Indices], clients: int, config: PartitionConfig) -> Indices:
    """Return the first of `DRAWS` draws in which every client has `min_images` images.

    If no draw succeeds, small clients of the last draw are topped up from the largest ones, with a
    warning: otherwise a run with many clients and a small alpha would be impossible.

    Args:
        draw: draws the client (M,) of every image; the result may be modified.
        clients: number of clients.
        config: `min_images`, and `alpha` for the warning.

    Returns:
        The client (M,) of every image.
    """
    for _ in range(DRAWS):
        owner_M = draw()
        if np.bincount(owner_M, minlength=clients).min() >= config.min_images:
            return owner_M
    return _top_up(owner_M, clients, config)


def _top_up(owner_M: Indices, clients: int, config: PartitionConfig) -> Indices:
    """Raise every client to `min_images` with random images of the client that then holds most."""
    sizes_K = np.bincount(owner_M, minlength=clients)
    grouped = np.argsort(owner_M, kind="stable")
    starts_K = np.cumsum(sizes_K) - sizes_K
    short = np.repeat(np.arange(clients), np.maximum(config.min_images - sizes_K, 0))
    for client in short:
        donor = sizes_K.argmax()
        sizes_K[donor] -= 1
        # The last image of the donor's group. Images are in random order, so it is a random one.
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
