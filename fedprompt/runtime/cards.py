"""The GPUs that this process may use: how many there are, what they are called, what is free.

The number and the names come from PyTorch, which need not reserve memory on a card for them. What
is free comes from NVIDIA's `nvidia-smi`, because PyTorch can only tell it for a card on which the
process has itself reserved some hundred megabytes.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import Any

import torch

QUERY = (
    "nvidia-smi",
    "--query-gpu=uuid,memory.free,driver_version",
    "--format=csv,noheader,nounits",
)
QUERY_LIMIT_S = 20.0
"""How long `nvidia-smi` may take; it is slow on a machine with many idle cards."""


@dataclass(frozen=True)
class Card:
    """One GPU.

    Attributes:
        name: its model.
        total_bytes: its memory.
        free_bytes: the memory that no process uses; None if the system does not tell.
        driver: the version of its driver; None if the system does not tell.
    """

    name: str
    total_bytes: int
    free_bytes: int | None = None
    driver: str | None = None


def count() -> int:
    """The number of GPUs that PyTorch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def cards() -> list[Card]:
    """The GPUs that PyTorch sees, in the order in which it numbers them."""
    facts = _queried() if count() else {}
    found = []
    for index in range(count()):
        card: Any = torch.cuda.get_device_properties(index)
        # Matched by UUID: CUDA may number the cards in another order than nvidia-smi.
        free, driver = facts.get(f"GPU-{getattr(card, 'uuid', '')}", (None, None))
        found.append(Card(card.name, card.total_memory, free, driver))
    return found


def device_facts(device: torch.device) -> dict[str, Any]:
    """What a result should say about its device: its name, and the driver's and CUDA's versions.

    Args:
        device: the device of a backbone.

    Returns:
        `device`, and for a GPU also `card`, `driver` and `cuda` (or `hip`).
    """
    facts: dict[str, Any] = {"device": str(device)}
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        card = cards()[index]
        facts |= {"card": card.name, "driver": card.driver, "cuda": torch.version.cuda}
        if torch.version.hip:
            facts["hip"] = torch.version.hip
    return facts


def wait_for_all() -> None:
    """Wait until every GPU on which this process has started has done all its work."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    if torch.backends.mps.is_available():
        torch.mps.synchronize()


def _queried() -> dict[str, tuple[int | None, str]]:
    """Free bytes and the driver's version by UUID; nothing where `nvidia-smi` does not answer."""
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=QUERY_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    facts = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        uuid, free, driver = (part.strip() for part in line.split(","))
        # In MiB; "[N/A]" on cards that share the memory of the machine.
        facts[uuid] = (int(free) * 2**20 if free.isdigit() else None, driver)
    return facts
