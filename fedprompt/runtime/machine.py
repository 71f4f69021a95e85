"""The processors and the memory that this process may use: those of its container, if it is in one.

A container sees all processors and the whole memory of its host. What it may use of them is in the
files of its control group, of version 1 or 2, and in those of the groups above it.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
UNLIMITED = 1 << 60
"""Version 1 writes a number of about 2^63 bytes for a memory without a limit."""


@dataclass(frozen=True)
class Memory:
    """Memory in bytes; None where the system does not tell.

    Attributes:
        total: what this process and its group may use altogether.
        free: what of it can be had now, caches of files included.
    """

    total: int | None
    free: int | None


def cpu_count() -> int:
    """The number of processors that this process may use, at least 1.

    A quota of a container that is no whole number is rounded up.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quotas = [math.ceil(quota) for group in _groups("cpu") if (quota := _cpu_quota(group))]
    return max(1, min([count or 1, *quotas]))


def memory() -> Memory:
    """The memory of this machine, or of the container if that has less."""
    total, free = _machine_memory()
    for group in _groups("memory"):
        limit = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
        if limit is None or limit >= UNLIMITED:
            continue
        total = min(limit, total) if total else limit
        used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes")
        if used is not None:
            # The kernel gives back cached files that were not read lately before a group runs out.
            here = max(0, limit - used + _cached(group))
            free = min(here, free) if free is not None else here
    return Memory(total, free)


def kilobytes(path: Path, name: str) -> int | None:
    """The value of a line `name: 123 kB` in a file of /proc, in units of 1024 bytes."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
    return None


def _machine_memory() -> tuple[int | None, int | None]:
    total, free = (kilobytes(PROC / "meminfo", name) for name in ("MemTotal", "MemAvailable"))
    if total is not None:
        return total * 1024, None if free is None else free * 1024
    try:
        # Systems other than Linux have no /proc; sysconf tells the total only.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    except (OSError, ValueError, AttributeError):
        return None, None


def _groups(controller: str) -> Iterator[Path]:
    """The folders of this process's control group and of those above it, as far as they are seen.

    Args:
        controller: `cpu` or `memory`.
    """
    for mount, root, version in _mounts(controller):
        path = _group_path(controller, version)
        if path is None:
            continue
        # In a container, the mount shows the group's own folder, and the path may be the host's.
        inside = path.removeprefix(root.rstrip("/")) if path.startswith(root) else "/"
        group = mount / inside.strip("/")
        if not group.is_dir():
            group = mount
        while True:
            yield group
            if group == mount:
                break
            group = group.parent


def _mounts(controller: str) -> Iterator[tuple[Path, str, int]]:
    """Where control groups are mounted: the folder, the group that it shows, and the version."""
    with contextlib.suppress(OSError):
        for line in (PROC / "self/mountinfo").read_text(encoding="utf-8").splitlines():
            # See proc(5): "id parent device root mount options - type source super-options".
            before, _, after = line.partition(" - ")
            left, right = before.split(), after.split()
            if len(left) > 4 and right and right[0] in ("cgroup", "cgroup2"):
                version = 2 if right[0] == "cgroup2" else 1
                if version == 2 or controller in right[-1].split(","):
                    yield Path(left[4].replace("\\040", " ")), left[3], version


def _group_path(controller: str, version: int) -> str | None:
    """This process's group below the root of a hierarchy."""
    with contextlib.suppress(OSError):
        for line in (PROC / "self/cgroup").read_text(encoding="utf-8").splitlines():
            number, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if number == "0" if version == 2 else controller in controllers.split(","):
                return path
    return None


def _cpu_quota(group: Path) -> float | None:
    """How many processors a group may use, in processor seconds per second; None without limit."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        if (group / "cpu.max").is_file():  # "max 100000" or "150000 100000", in microseconds
            quota, period = (group / "cpu.max").read_text().split()
            return None if quota == "max" else int(quota) / int(period)
        quota, period = ((group / f"cpu.cfs_{x}_us").read_text() for x in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    return None


def _cached(group: Path) -> int:
    """Bytes of a group that the kernel can give back at once."""
    with contextlib.suppress(OSError, ValueError):
        stat = dict(x.split() for x in (group / "memory.stat").read_text().splitlines())
        # In version 1, the names with "total" include the groups below, as the usage does.
        return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return 0


def _number(path: Path) -> int | None:
    """The number in a file; None if there is no file, or the word `max`."""
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return None
