"""`fedprompt doctor`: what this machine offers for a run, and which problems it has."""

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

from fedprompt.data.cache_files import default_cache_dir
from fedprompt.errors import UserError
from fedprompt.files import asset
from fedprompt.reports.format import human_bytes
from fedprompt.runtime.machine import cpu_count, memory

GIB = 2**30
LEAST_DISK = LEAST_MEMORY = GIB
"""With fewer free bytes than this, even a small run may fail."""
PACKAGES = ("torch", "open_clip_torch", "flwr", "ray", "datasets", "numpy", "scipy", "matplotlib")
EXTRAS = ("tensorboard", "mlflow", "mlflow-skinny", "wandb", "opacus")
SWITCHES = (
    "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "HF_ENDPOINT",
    "WANDB_MODE", "MLFLOW_TRACKING_URI", "FLWR_TELEMETRY_ENABLED", "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
SECRET = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
"""Variables whose values may contain a password, so that only their presence is printed."""
PROGRAMS = {
    "chromium": ("chromium", "chromium-browser", "google-chrome"),
    "git": ("git",),
    "flwr": ("flwr",),
    "flower-superlink": ("flower-superlink",),
    "nvidia-smi": ("nvidia-smi",),
}


@dataclass(frozen=True)
class Finding:
    """One line of the table; `problem` says what is wrong and how to fix it, or is empty."""

    group: str
    name: str
    value: str
    problem: str = ""


def examine(cache: str | None = None) -> list[Finding]:
    """Collect all findings, in the order in which they are printed.

    Args:
        cache: The feature cache, as `output.cache` in a config; None means the default.
    """
    return [
        *_versions(),
        *_devices(),
        *_store(default_cache_dir(cache)),
        *_memory(),
        *_environment(),
        *_programs(),
    ]


def _versions() -> Iterator[Finding]:
    own_version = _installed("fedprompt")
    yield Finding("versions", "fedprompt", own_version or "not installed")
    yield Finding("versions", "python", f"{platform.python_version()} ({sys.executable})")
    for name in PACKAGES:
        yield Finding("versions", name, _installed(name) or "missing")
    extras = [f"{name} {_installed(name)}" for name in EXTRAS if _installed(name)]
    yield Finding("versions", "extras", ", ".join(extras) or "none")
    for problem in unmet(requires("fedprompt") or [] if own_version else []):
        yield Finding("versions", problem.partition(" ")[0], "", problem)
    try:
        asset("backbone/assets/tiny_clip.safetensors")
    except UserError as error:
        yield Finding("versions", "embedded CLIP", "missing", str(error))


def unmet(requirements: list[str]) -> list[str]:
    """Return one line for each requirement that the installed packages do not meet.

    Args:
        requirements: Lines such as `torch>=2.5`. Those of extras are ignored.
    """
    problems = []
    for text in requirements:
        required = Requirement(text)
        # A marker such as `extra == "wandb"` is false for the empty extra, so extras drop out here.
        if required.marker is not None and not required.marker.evaluate({"extra": ""}):
            continue
        installed = _installed(required.name)
        command = f"pip install '{required.name}{required.specifier}'"
        if installed is None:
            problems.append(f"{required.name} is missing: {command}")
        elif not required.specifier.contains(installed, prereleases=True):
            problems.append(
                f"{required.name} {installed} does not fit {required.specifier}: {command}"
            )
    return problems


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> Iterator[Finding]:
    import torch

    cpus = (
        f"{os.cpu_count()} ({cpu_count()} for this process), PyTorch uses {torch.get_num_threads()}"
    )
    yield Finding("devices", "CPU cores", cpus)
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            yield Finding("devices", f"GPU {i}", f"{card.name}, {human_bytes(card.total_memory)}")
        return
    # The kernel driver creates this file, so a card is there although PyTorch sees none.
    driver = Path("/dev/nvidiactl").exists()
    problem = (
        f"an NVIDIA driver is present, but PyTorch {torch.__version__} cannot use it; install "
        "a build of PyTorch for its CUDA version"
    )
    yield Finding("devices", "GPU", "none", problem if driver else "")


def _store(cache: Path) -> Iterator[Finding]:
    here = cache
    # Disk space and write permission are those of the nearest folder that exists.
    while not here.exists():
        here = here.parent
    if cache.is_dir():
        files = [p for p in cache.rglob("*") if p.is_file()]
        size = human_bytes(sum(p.stat().st_size for p in files))
        text = f"{cache}, {size} in {len(files):,} files"
    else:
        text = f"{cache}, not created yet"
    writable = os.access(here, os.W_OK) and here.is_dir()
    problem = f"{cache} cannot be written: set FEDPROMPT_CACHE to a folder that can"
    yield Finding("storage", "feature cache", text, "" if writable else problem)
    for name, folder in (("cache", here), ("this folder", Path.cwd())):
        free = shutil.disk_usage(folder).free
        problem = f"only {human_bytes(free)} of disk are free at {folder}: make room"
        low = free < LEAST_DISK
        yield Finding("storage", f"free at {name}", human_bytes(free), problem if low else "")
    # Ray keeps its object store in shared memory, which containers often limit to 64 MB.
    if Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free
        yield Finding("storage", "shared memory (Ray)", human_bytes(free))


def _memory() -> Iterator[Finding]:
    here = memory()
    total, free = here.total, here.free
    low = free is not None and free < LEAST_MEMORY
    problem = f"only {human_bytes(free or 0)} of memory are free: close other programs"
    sizes = [f"{human_bytes(n)} {word}" for n, word in ((total, "in total"), (free, "free")) if n]
    yield Finding("memory", "memory", ", ".join(sizes) or "unknown", problem if low else "")


def _environment() -> Iterator[Finding]:
    for name in SWITCHES:
        if name in os.environ:
            yield Finding("environment", name, os.environ[name] or "(empty)")
    for name in SECRET:
        if name in os.environ:
            yield Finding("environment", name, "set")


def _programs() -> Iterator[Finding]:
    # Flower's commands are installed beside Python, also if its environment is not activated.
    beside = os.pathsep.join((os.environ.get("PATH", ""), str(Path(sys.executable).parent)))
    for name, commands in PROGRAMS.items():
        path = next((p for c in commands if (p := shutil.which(c, path=beside))), None)
        needed = name.startswith("fl") and path is None
        problem = f"{name} is missing, which comes with flwr: pip install flwr"
        yield Finding("programs", name, path or "missing", problem if needed else "")
