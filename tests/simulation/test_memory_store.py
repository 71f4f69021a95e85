"""The store of a simulation's private tensors in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fedprompt.simulation.memory_store import MemoryStore

AWKWARD = torch.tensor([[0.1, -0.0], [1e-45, 3.4e38]])
"""Values that a detour through text or float16 would change."""


def prompts(value: float) -> dict[str, Tensor]:
    return {"ctx": torch.full((2, 3), value)}


def bits(tensor: Tensor) -> list[int]:
    values: list[int] = tensor.contiguous().view(torch.int32).flatten().tolist()
    return values


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


def test_packing_keeps_every_bit() -> None:
    store = MemoryStore()
    tensors_of = {7: {"ctx": AWKWARD, "theta": torch.tensor(0.3)}}
    tensors_of[2] = {"ctx": -AWKWARD, "theta": torch.tensor(0.7)}
    for client, tensors in tensors_of.items():
        store.put(client, tensors)
    packed = store.pack()
    assert packed["clients"].tolist() == [2, 7]
    assert packed["tensor/ctx"].shape == (2, 2, 2)
    for row, client in enumerate((2, 7)):
        for name, tensor in tensors_of[client].items():
            assert bits(packed[f"tensor/{name}"][row]) == bits(tensor)


def test_a_client_without_private_tensors_stores_nothing() -> None:
    store = MemoryStore()
    store.put(0, {})
    assert store.get(0) is None
    assert store.pack() == {}
