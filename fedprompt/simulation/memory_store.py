"""The private tensors of simulated clients, in memory.

Used for baselines, and for runs without a checkpoint; `PrivateLog` stores them on disk.
"""

from __future__ import annotations

from fedprompt.methods.base import Tensors


class MemoryStore:
    """The private tensors of a simulation's clients, by client id."""

    def __init__(self) -> None:
        self._tensors: dict[int, Tensors] = {}

    def get(self, client: int) -> Tensors | None:
        """A client's tensors, or None before its first training."""
        return self._tensors.get(client)

    def put(self, client: int, tensors: Tensors) -> None:
        """Store a client's tensors; an empty dict (no private tensors) is not stored."""
        if tensors:
            self._tensors[client] = tensors
