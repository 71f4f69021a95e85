"""Memory of processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedprompt.bench.isolated import in_fresh_process
from fedprompt.bench.machine import peak_mb, private_mb
from fedprompt.bench.memory import MemoryOptions, inline_round, reference_step, write_experiment
from fedprompt.runtime.peak_memory import reset_peak_memory

linux = pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")


@linux
def test_peak_memory_is_reset_and_sees_what_was_freed() -> None:
    reset_peak_memory()
    before = peak_mb()
    assert before is not None
    torch.ones(25_000_000)  # 100 MB, freed again immediately
    after = peak_mb()
    assert after is not None
    assert 90 < after - before < 150
    reset_peak_memory()
    low = peak_mb()
    assert low is not None
    assert low < after - 80
    private = private_mb()
    assert private is not None
    assert 0 < private <= low


def test_a_fresh_process_has_our_threads() -> None:
    assert in_fresh_process(torch.get_num_threads) == torch.get_num_threads()


def test_memory(tmp_path: Path) -> None:
    config = write_experiment(tmp_path, MemoryOptions("tiny", classes=3, workers=0))
    ours, reference = inline_round(config), reference_step(config)
    assert set(ours) >= {"ours_s", "peak_mb", "private_mb", "libraries_mb"}
    assert reference["max_rel_diff"] < 1e-4
