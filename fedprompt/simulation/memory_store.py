"""Private tensors of simulated clients, in memory."""

from __future__ import annotations

import torch

from fedprompt.methods.base import Tensors


class MemoryStore:
    """Private tensors of a simulation's clients, by client id."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensors] = {}

    def get(self, client: int) -> Tensors | None:
        """A client's tensors, or None before it has trained."""
        return self._kept.get(client)

    def put(self, client: int, tensors: Tensors) -> None:
        """Keep a client's tensors."""
        if tensors:
            self._kept[client] = tensors

    def pack(self) -> Tensors:
        """Everything as few tensors with a leading client axis: `clients` and `tensor/<name>`."""
        if not self._kept:
            return {}
        clients = sorted(self._kept)
        packed = {"clients": torch.tensor(clients, dtype=torch.int64)}
        for name in self._kept[clients[0]]:
            packed[f"tensor/{name}"] = torch.stack([self._kept[c][name] for c in clients])
        return packed
