"""A run whose rounds are divided into cycles of equal length.

The learning rate restarts with every cycle (`fedprompt/training.py`), a method may train
differently at the beginning and at the end of one, and a strategy may keep what a cycle ends with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a round lies in its cycle.

    Attributes:
        cycle: the cycle, from 0.
        position: the round's place in the cycle, from 0.
        length: rounds of a whole cycle; the last one may have fewer.
    """

    cycle: int
    position: int
    length: int

    @property
    def share(self) -> float:
        """The part of the cycle that lies before the round, in [0, 1)."""
        return self.position / self.length


def place_of(server_round: int, rounds: int, cycles: int) -> Place:
    """Find the place of a round.

    Args:
        server_round: the round, from 1.
        rounds: number of rounds of the run.
        cycles: number of cycles; with fewer rounds than cycles, every round is a cycle.
    """
    length = max(1, math.ceil(rounds / cycles))
    # Rounds behind the end of the run, as tests of single rounds have them, belong to the last one.
    cycle = min((server_round - 1) // length, cycles - 1)
    return Place(cycle, (server_round - 1) % length, length)
