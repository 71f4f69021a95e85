"""The quota and the limits of a container count, not its host's processors and memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedprompt.cli import doctor
from fedprompt.config.schema import SimulationConfig
from fedprompt.runtime import machine, thread_count
from fedprompt.runtime.device_memory import free_memory, is_shortage
from fedprompt.runtime.machine import cpu_count, memory
from fedprompt.sweeps.plan import Resources
from fedprompt.sweeps.run import places_here

GIB = 1 << 30
Files = dict[str, str]
Container = Callable[[str, str, Files], None]


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Container:
    """A host with 64 processors and 256 GiB, of which half is free, and files of groups."""
    proc, mount = tmp_path / "proc", tmp_path / "cgroup"

    def make(mountinfo: str, cgroup: str, files: Files) -> None:
        (proc / "self").mkdir(parents=True)
        (proc / "meminfo").write_text(f"MemTotal:  {256 << 20} kB\nMemAvailable:  {128 << 20} kB\n")
        (proc / "self/mountinfo").write_text(mountinfo.format(mount=mount))
        (proc / "self/cgroup").write_text(cgroup)
        for name, text in files.items():
            (mount / name).parent.mkdir(parents=True, exist_ok=True)
            (mount / name).write_text(text)

    monkeypatch.setattr(machine, "PROC", proc)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    return make


V1 = (
    "32 31 0:29 {root} {{mount}}/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {root} {{mount}}/memory rw - cgroup cgroup rw,memory\n"
)
V2 = "30 23 0:26 / {mount} rw,nosuid - cgroup2 cgroup rw\n"


def in_version_2(container: Container) -> None:
    # The group above has the smaller limit.
    container(V2, "0::/slice/job\n", {
        "slice/cpu.max": "250000 100000\n",
        "slice/memory.max": f"{4 * GIB}\n",
        "slice/memory.current": f"{3 * GIB}\n",
        "slice/memory.stat": f"anon 5\ninactive_file {GIB}\n",
        "slice/job/cpu.max": "max 100000\n",
        "slice/job/memory.max": "max\n",
        "slice/job/memory.current": f"{3 * GIB}\n",
    })  # fmt: skip


def in_version_1(container: Container) -> None:
    # As docker does it: the path is the host's, and the mount shows the group's own folder.
    container(V1.format(root="/docker/7f"), "5:memory:/docker/7f\n4:cpu,cpuacct:/docker/7f\n", {
        "cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
        "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "memory/memory.limit_in_bytes": f"{4 * GIB}\n",
        "memory/memory.usage_in_bytes": f"{3 * GIB}\n",
        "memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
    })  # fmt: skip


@pytest.mark.parametrize("limits", [in_version_1, in_version_2])
def test_the_limits_of_a_container_count(
    limits: Callable[[Container], None], container: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits(container)
    assert cpu_count() == 3
    assert memory() == machine.Memory(4 * GIB, 2 * GIB)
    # Whoever decides by them sees the same numbers.
    assert free_memory(torch.device("cpu")) == 2 * GIB
    assert places_here(Resources(cpus=1), 24) == 3
    assert places_here(Resources(cpus=1, memory_gb=1.1), 24) == 1
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert thread_count(SimulationConfig()) == 3
    assert thread_count(SimulationConfig(threads=5)) == 5, "the experiment's number is kept"
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert thread_count(SimulationConfig()) == 64, "the user's number is kept"
    (line,) = doctor._memory()
    assert "4.0 GiB in total" in line.value
    assert "2.0 GiB free" in line.value


@pytest.mark.parametrize(
    ("mountinfo", "cgroup", "files"),
    [
        ("", "", {}),
        (V2, "0::/\n", {}),
        (V2, "0::/\n", {"cpu.max": "max 100000", "memory.max": "max"}),
        (V2, "0::/\n", {"cpu.max": "torn", "memory.max": "torn"}),
        (V1.format(root="/"), "5:memory:/a/b\n4:cpu,cpuacct:/\n", {
            "cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
            "memory/memory.limit_in_bytes": "9223372036854771712",
            "memory/memory.usage_in_bytes": "5",
        }),
    ],
)  # fmt: skip
def test_without_limits_the_machine_counts(
    mountinfo: str, cgroup: str, files: Files, container: Container
) -> None:
    container(mountinfo, cgroup, files)
    assert cpu_count() == 64
    assert memory() == machine.Memory(256 * GIB, 128 * GIB)


def test_a_system_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROC", tmp_path)
    total, free = memory().total, memory().free
    assert total is not None
    assert total > 1e7
    assert free is None
    assert free_memory(torch.device("cpu")) == total / 2


def test_blocks_that_pytorch_keeps_on_a_gpu_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("mem_get_info", (2 * GIB, 16 * GIB)),
        ("memory_reserved", 10 * GIB),
        ("memory_allocated", 3 * GIB),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_memory(torch.device("cuda")) == 9 * GIB


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_a_shortage_of_memory_is_told_from_other_errors(error: Exception, short: bool) -> None:
    assert is_shortage(error) is short
