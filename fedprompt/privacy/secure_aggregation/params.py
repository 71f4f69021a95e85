"""A round's terms, which server and clients work out each for itself, and what cannot be met."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedprompt.config.schema import SecureAggregationConfig

MODULUS = 2**32
"""Masked numbers are sums modulo this: four bytes each."""
MOST_LEVELS = 2**30
"""Flower rounds in 32 bits with a sign."""
FEWEST_CLIENTS = 3
"""Of a sum of two, each client knows the other's part."""
SEEN_THROUGH = ("sign_flip", "scaling", "label_flip", "random_noise", "crash")
"""Attacks that need no check of single replies to be survived, or are simply not noticed."""


@dataclass(frozen=True)
class Terms:
    """What the clients of a round agree on.

    `shares` is the number of clients among whom each splits its secrets, itself included, of which
    `threshold` recover them; `levels` the steps that a number of the vector is rounded to.
    """

    clients: int
    shares: int
    threshold: int
    levels: int

    @classmethod
    def of(cls, settings: SecureAggregationConfig, clients: int) -> Terms:
        """The terms of a round that `clients` are asked to."""
        shares = min(settings.shares or clients, clients)
        threshold = math.ceil(round(settings.threshold * shares, 9))
        # The sum of all clients' numbers, each at most `levels`, must stay below the modulus.
        levels = min(MOST_LEVELS, 1 << (((MODULUS - 1) // clients).bit_length() - 1))
        return cls(clients, shares, threshold, levels)

    def setup(self) -> dict[str, int | float]:
        """The same in the words of Flower's setup message.

        Numbers are scaled and weighed before Flower sees them, hence range and weight 1.
        """
        return {
            "sample_num": self.clients,
            "share_num": self.shares,
            "threshold": self.threshold,
            "clipping_range": 1.0,
            "target_range": self.levels,
            "mod_range": MODULUS,
            "max_weight": 1.0,
        }
