"""Settings of a process: environment variables that libraries read on import, threads, versions.

The command line and every worker set the variables before they import PyTorch, Flower or Ray. Every
process of a run sets its number of threads before it trains.
"""

from __future__ import annotations

import contextlib
import gc
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

from fedprompt.runtime.machine import cpu_count

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DEFAULTS = {
    # cuBLAS reads it when CUDA starts, and with another workspace does not promise the same bits
    # again. Set in every process, so that a run with `backbone.deterministic` may follow any other.
    CUBLAS_WORKSPACE: ":4096:8",
    # Idle OpenMP threads sleep. Spinning threads multiply the time of a step on a busy machine.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Flower, Ray and MLflow otherwise report usage over the network. Without a connection, Flower's
    # report delays the end of a process by up to four seconds.
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
LOOPBACK = ("localhost", "127.0.0.1", "::1")

OPTIONAL_LIBRARIES = frozenset({"timm", "transformers"})
"""Libraries that open_clip imports where they are installed, and that few backbones need."""
PACKAGES = {
    "fedprompt": "fedprompt",
    "torch": "torch",
    "open_clip": "open_clip_torch",
    "flwr": "flwr",
    "ray": "ray",
    "numpy": "numpy",
}
"""From the name under which a run lists a package's version to the name of its distribution."""


def versions() -> dict[str, str | None]:
    """Return the versions on which a result depends; None where a package is not installed."""
    installed: dict[str, str | None] = {}
    for name, distribution in PACKAGES.items():
        try:
            installed[name] = version(distribution)
        except PackageNotFoundError:
            installed[name] = None
    return {"python": platform.python_version(), **installed}


def set_defaults() -> None:
    """Disable spinning threads, telemetry and update checks, except where the user has set them.

    No call on the loopback interface goes through a proxy.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    _keep_loopback_direct()


@contextlib.contextmanager
def many_imports() -> Iterator[None]:
    """Import large libraries without searches for garbage.

    PyTorch, open_clip and Flower make a million objects that stay. To look for garbage among them
    again and again would take a fifth of the time of these imports.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _keep_loopback_direct() -> None:
    """Add the loopback interface to `NO_PROXY`, if any variable names a proxy.

    Processes of one machine, such as Flower's, talk over it, and no proxy could reach it.
    """
    if not any(os.environ.get(name) for x in PROXIES for name in (x, x.upper())):
        return
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host for part in given.split(",") if (host := part.strip())]
    if "*" not in hosts:
        hosts += [host for host in LOOPBACK if host not in hosts]
    # Libraries differ in which of the two they read first.
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(hosts)


class ThreadSettings(Protocol):
    """The keys of the `simulation` section that decide the number of threads."""

    @property
    def threads(self) -> int:
        """CPU threads per process; 0 leaves the choice to `thread_count`."""
        ...

    @property
    def cpus_per_worker(self) -> float:
        """CPUs that Ray reserves for one worker."""
        ...


def thread_count(config: ThreadSettings, *, worker: bool = False) -> int:
    """Return the number of CPU threads of a process: `simulation.threads`, or a default if it is 0.

    Args:
        config: the config's `simulation` section.
        worker: whether the process is a Ray worker. The default of a worker is the number of its
            CPUs. That of other processes is PyTorch's, which counts the machine's cores, or the
            processors of the container if these are fewer and `OMP_NUM_THREADS` is not set.
    """
    import torch  # not at the top: `set_defaults` must run before torch is imported

    if config.threads:
        return config.threads
    if worker:
        return max(1, int(config.cpus_per_worker))
    threads = torch.get_num_threads()
    return threads if "OMP_NUM_THREADS" in os.environ else min(threads, cpu_count())


def use_threads(config: ThreadSettings, *, worker: bool = False) -> None:
    """Set the number of threads of this process.

    The last bits of every matrix product depend on this number, so runs that must agree bit for
    bit need the same number.

    Args:
        config: the config's `simulation` section.
        worker: whether the process is a Ray worker.
    """
    import torch

    torch.set_num_threads(thread_count(config, worker=worker))
