"""How many CPU threads PyTorch may use in this process."""

from __future__ import annotations

import torch

from fedprompt.schema import GridConfig


def thread_count(config: GridConfig, *, worker: bool = False) -> int:
    """`grid.threads`; where that is 0, a Ray worker's own CPUs, elsewhere what PyTorch uses."""
    own = max(1, int(config.cpus_per_worker)) if worker else torch.get_num_threads()
    return config.threads or own


def use_threads(config: GridConfig, *, worker: bool = False) -> None:
    """Set this process's threads; the last bits of every product depend on their number."""
    torch.set_num_threads(thread_count(config, worker=worker))
