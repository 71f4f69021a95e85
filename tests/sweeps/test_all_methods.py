"""The table of all methods: each one has a row, and one command runs them all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fedprompt.experiment.compose import compose
from fedprompt.methods.registry import all_methods
from tests.support import ROOT

SWEEP = ROOT / "configs" / "sweep" / "all_methods.yaml"


def table() -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.load(SWEEP))
    assert isinstance(content, dict)
    return content  # type: ignore[return-value]


def test_every_method_has_a_row_and_three_seeds() -> None:
    configs = [compose("all_methods", overrides) for overrides in table()["rows"].values()]
    assert {c.method.name for c in configs} == set(all_methods())
    assert table()["seeds"] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_command_runs_all_methods(tmp_path: Path) -> None:
    """One seed for each row; tests/reports/compare has tables of several seeds."""
    few = ["federation.rounds=2", "evaluation.every=2", "data.images_per_class=8"]
    few += ["partition.shots=4", "partition.clients=4", "simulation.threads=1"]
    # A report is made of a run's files, whatever its method is; it would take half of the time.
    few += ["output.report=false"]
    environment, out = os.environ | {"OMP_NUM_THREADS": "1"}, ["--out", str(tmp_path)]
    fedprompt = [sys.executable, "-m", "fedprompt"]
    for command in (
        [*fedprompt, "sweep", str(SWEEP), *few, "--seeds", "1", "--serial", *out],
        [*fedprompt, "compare", str(tmp_path), "--format", "markdown"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    named = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in lines[2:]}
    assert list(named) == list(table()["rows"])
    for name, cells in named.items():
        assert any(cell.strip()[:1].isdigit() for cell in cells), f"{name} has no result: {cells}"
