"""The parameters of a round.

Server and clients derive them independently from the experiment, so that a client can refuse those
of a server that deviates.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from fedprompt.config.protection import SecureAggregationConfig

MODULUS = 2**32
"""Masked numbers are sums modulo this, and take four bytes each."""
MOST_LEVELS = 2**30
"""Largest number of rounding steps: Flower rounds to signed integers of 32 bits."""
FEWEST_CLIENTS = 3
"""Smallest number of clients in a round: from the sum of two, each learns the other's part."""
SEEN_THROUGH = ("sign_flip", "scaling", "label_flip", "random_noise", "backdoor", "crash")
"""Simulated attacks that do not rely on the check of single replies to be stopped."""


@dataclass(frozen=True)
class Terms:
    """What the clients of a round agree on.

    Attributes:
        clients: number of clients that the experiment asks to train in a round. Those that cannot
            be reached count as dropped out, so that nobody can lower the threshold by asking fewer.
        shares: number of clients among which each client splits its secrets, itself included.
        threshold: number of shares from which a secret is recovered; more than two thirds of
            `shares`, so that two different lists of survivors cannot both be confirmed.
        levels: number of steps that a number of the vector is rounded to.
    """

    clients: int
    shares: int
    threshold: int
    levels: int

    @classmethod
    def of(cls, settings: SecureAggregationConfig, clients: int) -> Terms:
        """The terms of a round with this number of clients."""
        shares = min(settings.shares or clients, clients)
        # Rounded first, because 0.56 * 25 is slightly more than 14 in floating point.
        threshold = max(math.ceil(round(settings.threshold * shares, 9)), 2 * shares // 3 + 1)
        # The sum of all clients' numbers, each at most `levels`, must stay below the modulus.
        levels = min(MOST_LEVELS, 1 << (((MODULUS - 1) // clients).bit_length() - 1))
        return cls(clients, shares, threshold, levels)

    def setup(self) -> dict[str, int | float]:
        """The terms as Flower's setup message expresses them."""
        # Numbers are scaled and weighted before Flower sees them, so its range and weight are 1.
        return {
            "sample_num": self.clients,
            "share_num": self.shares,
            "threshold": self.threshold,
            "clipping_range": 1.0,
            "target_range": self.levels,
            "mod_range": MODULUS,
            "max_weight": 1.0,
        }


def draw_peers(nodes: Sequence[int], shares: int) -> dict[int, set[int]]:
    """Every node's peers, itself included.

    Args:
        nodes: Flower's node ids.
        shares: number of peers of each node; an odd number, or the number of nodes.

    Returns:
        All nodes, or each node's neighbours on a circle in random order. The order comes from the
        operating system, so that nobody can choose a node's neighbours.
    """
    if shares >= len(nodes):
        return {node: set(nodes) for node in nodes}
    circle, total = list(nodes), len(nodes)
    secrets.SystemRandom().shuffle(circle)
    steps = range(-(shares // 2), shares // 2 + 1)
    return {
        node: {circle[(place + step) % total] for step in steps}
        for place, node in enumerate(circle)
    }
