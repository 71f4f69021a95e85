"""The store of a simulation's private tensors in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fedprompt.simulation.memory_store import MemoryStore


def prompts(value: float) -> dict[str, Tensor]:
    return {"ctx": torch.full((2, 3), value)}


def test_tensors_are_stored_by_client() -> None:
    store = MemoryStore()
    assert store.get(3) is None
    store.put(3, prompts(1.0))
    store.put(0, prompts(2.0))
    store.put(3, prompts(4.0))
    stored = store.get(3)
    assert stored is not None
    assert torch.equal(stored["ctx"], torch.full((2, 3), 4.0))
    assert store.get(1) is None


def test_a_client_without_private_tensors_stores_nothing() -> None:
    store = MemoryStore()
    store.put(0, {})
    assert store.get(0) is None
