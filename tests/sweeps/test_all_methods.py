"""The table of all methods: each one has a row, and one command runs them all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fedprompt.experiment.compose import compose
from fedprompt.methods.registry import all_methods
from tests.support import ROOT

SWEEP = ROOT / "configs" / "sweep" / "all_methods.yaml"


def rows() -> dict[str, list[str]]:
    table = OmegaConf.to_container(OmegaConf.load(SWEEP))
    assert isinstance(table, dict)
    return table["rows"]  # type: ignore[no-any-return]


def test_every_method_has_a_row() -> None:
    configs = [compose("all_methods", overrides) for overrides in rows().values()]
    assert {c.method.name for c in configs} == set(all_methods())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_command_runs_all_methods_over_three_seeds(tmp_path: Path) -> None:
    few = ["federation.rounds=2", "evaluation.every=2", "data.images_per_class=8"]
    few += ["partition.shots=4", "partition.clients=4", "simulation.threads=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    fedprompt = [sys.executable, "-m", "fedprompt"]
    for command in (
        [*fedprompt, "sweep", str(SWEEP), *few, "--serial", "--out", str(tmp_path)],
        [*fedprompt, "compare", str(tmp_path), "--format", "markdown"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    named = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in lines[2:]}
    assert list(named) == list(rows())
    for name, cells in named.items():
        assert any("±" in cell for cell in cells), f"{name} has no result: {cells}"
