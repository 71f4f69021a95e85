"""The process: environment variables that must be set before torch, and the number of threads."""

from __future__ import annotations

import os
from typing import Protocol

DEFAULTS = {
    # Idle threads sleep instead of spinning: on a busy machine that costs several times the work.
    "OMP_WAIT_POLICY": "PASSIVE",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def set_defaults() -> None:
    """Set them where the user has not decided: no spinning threads, telemetry or update check."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


class ThreadSettings(Protocol):
    """The keys of a simulation's config that decide on threads."""

    @property
    def threads(self) -> int:
        """CPU threads per process; 0 leaves the choice to `thread_count`."""
        ...

    @property
    def cpus_per_worker(self) -> float:
        """CPUs that Ray reserves for one worker."""
        ...


def thread_count(config: ThreadSettings, *, worker: bool = False) -> int:
    """`simulation.threads`; where that is 0, a Ray worker's CPUs, elsewhere what PyTorch uses."""
    import torch  # late: the environment must be set before torch is imported

    own = max(1, int(config.cpus_per_worker)) if worker else torch.get_num_threads()
    return config.threads or own


def use_threads(config: ThreadSettings, *, worker: bool = False) -> None:
    """Set this process's threads; the last bits of every product depend on their number."""
    import torch

    torch.set_num_threads(thread_count(config, worker=worker))
