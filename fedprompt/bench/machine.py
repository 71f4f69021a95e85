"""What a number was measured on, and how much memory a process takes.

Private memory is read from /proc, which only Linux has; elsewhere it is None.
"""

from __future__ import annotations

import contextlib
import math
import platform
import time
from typing import Any

import torch

from fedprompt.runtime import versions
from fedprompt.runtime.cards import device_facts, wait_for_all
from fedprompt.runtime.device_memory import free_memory
from fedprompt.runtime.machine import PROC, cpu_count, kilobytes, memory
from fedprompt.runtime.peak_memory import peak_memory

GB, MB = 1e9, 1e6


def machine(device: str = "cpu") -> dict[str, Any]:
    """What every row of a result holds about where it was measured.

    Args:
        device: the device of the benchmark.

    Returns:
        Processor, cores, threads, versions and memory in GB; the device, with a GPU's name and
        driver; and the speed of large matrix products on it in GFLOP/s.
    """
    total = memory().total
    return {
        "cpu": _cpu_model(),
        "cores": cpu_count(),
        "threads": torch.get_num_threads(),
        **versions(),
        "memory_gb": None if total is None else round(total / GB, 1),
        "free_gb": round(free_memory(torch.device("cpu")) / GB, 1),
        **device_facts(torch.device(device)),
        "products_gflop_per_s": round(product_speed(torch.device(device))),
    }


def product_speed(device: torch.device) -> float:
    """GFLOP/s of square float32 matrix products, at the precision that PyTorch is set to.

    Args:
        device: where they are computed. On a CPU, they are small enough not to take a second.
    """
    size, products = (1024, 2) if device.type == "cpu" else (8192, 20)
    a = torch.ones(size, size, device=device)
    best = math.inf
    for _ in range(3):
        wait_for_all()
        began = time.perf_counter()
        for _ in range(products):
            torch.mm(a, a)
        wait_for_all()
        best = min(best, time.perf_counter() - began)
    return 2 * products * size**3 / best / 1e9


def describe_machine(facts: dict[str, Any]) -> str:
    """One line for the header."""
    card = f"{facts['card']} (driver {facts['driver']}), " if "card" in facts else ""
    return (
        f"{card}{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, torch "
        f"{facts['torch']}, {facts['free_gb']} of {facts['memory_gb']} GB free"
    )


def peak_mb(process: int | str = "self") -> float | None:
    """A process's largest resident memory in MB, since its start or `reset_peak_memory`."""
    peak = peak_memory(process)
    return None if peak is None else peak / MB


def private_mb(process: int | str = "self") -> float | None:
    """Resident memory in MB that a process shares with no other (Private_Clean + Private_Dirty)."""
    path = PROC / str(process) / "smaps_rollup"
    parts = [kilobytes(path, name) for name in ("Private_Clean", "Private_Dirty")]
    return None if None in parts else sum(p or 0 for p in parts) * 1024 / MB


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in (PROC / "cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
