"""`fedprompt doctor`: what this machine has, and what is wrong with it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from fedprompt.data.features.cache import default_cache_dir
from fedprompt.errors import UserError
from fedprompt.files import asset
from fedprompt.reports.format import human_bytes

GIB = 2**30
LEAST_DISK = LEAST_MEMORY = GIB
"""Below so many free bytes even a small run may fail."""
SHOWN = ("torch", "open_clip_torch", "flwr", "ray", "datasets", "numpy", "scipy", "matplotlib")
EXTRAS = ("tensorboard", "mlflow", "mlflow-skinny", "wandb", "opacus")
SWITCHES = (
    "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "HF_ENDPOINT",
    "WANDB_MODE", "MLFLOW_TRACKING_URI", "FLWR_TELEMETRY_ENABLED", "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
SECRETIVE = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
"""Their values may hold a password."""
PROGRAMS = {
    "chromium": ("chromium", "chromium-browser", "google-chrome"),
    "git": ("git",),
    "flwr": ("flwr",),
    "flower-superlink": ("flower-superlink",),
    "nvidia-smi": ("nvidia-smi",),
}


@dataclass(frozen=True)
class Finding:
    """One line of the table; `problem` says what to do where something is wrong."""

    group: str
    name: str
    value: str
    problem: str = ""


def examine(cache: str | None = None) -> list[Finding]:
    """Everything, in the order in which it is shown."""
    return [
        *_versions(),
        *_devices(),
        *_store(default_cache_dir(cache)),
        *_memory(),
        *_environment(),
        *_programs(),
    ]


def _versions() -> Iterator[Finding]:
    found = _installed("fedprompt")
    yield Finding("versions", "fedprompt", found or "not installed")
    yield Finding("versions", "python", f"{platform.python_version()} ({sys.executable})")
    for name in SHOWN:
        yield Finding("versions", name, _installed(name) or "missing")
    extras = [f"{name} {_installed(name)}" for name in EXTRAS if _installed(name)]
    yield Finding("versions", "extras", ", ".join(extras) or "none")
    for problem in unmet(requires("fedprompt") or [] if found else []):
        yield Finding("versions", problem.partition(" ")[0], "", problem)
    try:
        asset("backbone/assets/tiny_clip.safetensors")
    except UserError as error:
        yield Finding("versions", "embedded CLIP", "missing", str(error))


def unmet(requirements: list[str]) -> list[str]:
    """One line for each requirement that the installed packages do not meet; extras are left out.

    A requirement is a line such as `torch>=2.5`.
    """
    problems = []
    for text in requirements:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        found = _installed(wanted.name)
        how = f"pip install '{wanted.name}{wanted.specifier}'"
        if found is None:
            problems.append(f"{wanted.name} is missing: {how}")
        elif not wanted.specifier.contains(found, prereleases=True):
            problems.append(f"{wanted.name} {found} does not fit {wanted.specifier}: {how}")
    return problems


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> Iterator[Finding]:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpus = f"{os.cpu_count()} ({usable} for this process), PyTorch uses {torch.get_num_threads()}"
    yield Finding("devices", "CPU cores", cpus)
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            yield Finding("devices", f"GPU {i}", f"{card.name}, {human_bytes(card.total_memory)}")
        return
    driver = Path("/dev/nvidiactl").exists()
    problem = (
        f"an NVIDIA driver is here, but PyTorch {torch.__version__} cannot use it: install a build "
        "of PyTorch for its CUDA version"
    )
    yield Finding("devices", "GPU", "none", problem if driver else "")


def _store(cache: Path) -> Iterator[Finding]:
    here = cache
    while not here.exists():
        here = here.parent
    if cache.is_dir():
        files = [p for p in cache.rglob("*") if p.is_file()]
        size = human_bytes(sum(p.stat().st_size for p in files))
        text = f"{cache}, {size} in {len(files):,} files"
    else:
        text = f"{cache}, not there yet"
    writable = os.access(here, os.W_OK) and here.is_dir()
    problem = f"{cache} cannot be written: set FEDPROMPT_CACHE to a folder that can"
    yield Finding("storage", "feature cache", text, "" if writable else problem)
    for name, folder in (("cache", here), ("this folder", Path.cwd())):
        free = shutil.disk_usage(folder).free
        problem = f"only {human_bytes(free)} of disk are free at {folder}: make room"
        low = free < LEAST_DISK
        yield Finding("storage", f"free at {name}", human_bytes(free), problem if low else "")
    if Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free
        yield Finding("storage", "shared memory (Ray)", human_bytes(free))


def _memory() -> Iterator[Finding]:
    total, free = memory()
    low = free is not None and free < LEAST_MEMORY
    problem = f"only {human_bytes(free or 0)} of memory are free: end other programs"
    shown = [f"{human_bytes(n)} {word}" for n, word in ((total, "in all"), (free, "free")) if n]
    yield Finding("memory", "memory", ", ".join(shown) or "unknown", problem if low else "")


def memory() -> tuple[int | None, int | None]:
    """Bytes of memory in all and available; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        return found.get("MemTotal"), found.get("MemAvailable")
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    except (OSError, ValueError):
        return None, None


def _environment() -> Iterator[Finding]:
    for name in SWITCHES:
        if name in os.environ:
            yield Finding("environment", name, os.environ[name] or "(empty)")
    for name in SECRETIVE:
        if name in os.environ:
            yield Finding("environment", name, "set")


def _programs() -> Iterator[Finding]:
    beside = os.pathsep.join((os.environ.get("PATH", ""), str(Path(sys.executable).parent)))
    for name, commands in PROGRAMS.items():
        found = next((path for c in commands if (path := shutil.which(c, path=beside))), None)
        needed = name.startswith("fl") and found is None
        problem = f"{name} is not there, which comes with flwr: pip install flwr"
        yield Finding("programs", name, found or "not there", problem if needed else "")
