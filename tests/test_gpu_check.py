"""The script for a short visit to a GPU: how its checks are isolated, and its version for a CPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support import ROOT

SCRIPT = ROOT / "scripts" / "gpu_check.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_check_that_fails_hides_no_other(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(visit: Any) -> None:
        visit.facts["seen"] = 1
        raise ZeroDivisionError("in a check")

    def elsewhere(visit: Any) -> None:
        visit.only_cuda()

    def fine(visit: Any) -> None:
        visit.facts["seen"] = 2

    monkeypatch.setattr(script, "CHECKS", (broken, elsewhere, fine))
    assert script.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert {n: r["state"] for n, r in results.items()} == {
        "broken": "FAIL",
        "elsewhere": "skip",
        "fine": "ok",
    }
    assert "ZeroDivisionError: in a check" in results["broken"]["why"]
    assert [results[n]["facts"] for n in ("broken", "fine")] == [{"seen": 1}, {"seen": 2}]
    assert script.main(["--device", "cpu", "--only", "fine", "--out", str(tmp_path)]) == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_small_version_passes_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    skipped = {name for name, found in results.items() if found["state"] == "skip"}
    assert skipped == {"waits", "memory", "out_of_memory", "cuda_graphs"}
    assert results["methods"]["facts"]["gaps"]
