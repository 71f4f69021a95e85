"""A sweep compared with the same runs as `fedprompt run` commands, one after another.

Every command is a process of its own. Images are encoded before anything is timed, and all commands
read the same feature cache. Metrics and prompts of all runs must be byte-equal.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import yaml

from fedprompt.bench.compare import MismatchError
from fedprompt.bench.output import Column, Output
from fedprompt.config.schema import to_yaml
from fedprompt.errors import UserError
from fedprompt.reports.run_data import METRICS, PROMPTS
from fedprompt.sweeps.plan import PlannedRun, expand, load_sweep

COLUMNS: tuple[Column, ...] = (
    ("case", "case", ""),
    ("sweep s", "ours_s", ".1f"),
    ("one by one s", "reference_s", ".1f"),
    ("ratio", "ratio", ".2f"),
    ("different files", "different", "d"),
)
METHODS = ("promptfl", "fedrsclip")
ALPHAS = (0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class SweepOptions:
    """What `bench sweep` runs: two methods, four partitions, and as many seeds as `runs` needs."""

    runs: int = 24
    rounds: int = 30
    images_per_class: int = 60
    device: str = "cpu"


def bench_sweep(options: SweepOptions, out: Output) -> None:
    """Run the sweep and the single commands, and compare time and results.

    Raises:
        MismatchError: a file of a run differs.
        UserError: a command fails, or the number of runs is not a multiple of eight.
    """
    each = len(METHODS) * len(ALPHAS)
    if options.runs % each:
        raise UserError(f"--runs is {options.runs}; it must be a multiple of {each}.")
    with tempfile.TemporaryDirectory(prefix="fedprompt-bench-") as name:
        folder = Path(name)
        environment = {**os.environ, "FEDPROMPT_CACHE": str(folder / "cache")}
        file = _write_sweep(folder, options, seeds=options.runs // each)
        planned = expand(load_sweep(file), folder / "sweep")
        out.progress("encoding the images once")
        # Fills the feature cache, which all runs share.
        _run_one(planned[0], folder / "first", environment)
        out.progress(f"{len(planned)} runs one after another")
        began = perf_counter()
        for run in planned:
            _run_one(run, folder / "single" / run.name, environment)
        single_s = perf_counter() - began
        out.progress("the same as a sweep")
        began = perf_counter()
        _command(["sweep", str(file), "--out", str(folder / "sweep")], environment)
        sweep_s = perf_counter() - began
        different = _differences(planned, folder / "single")
    case = f"{len(planned)} runs of {options.rounds} rounds"
    if different:
        raise MismatchError(f"{case}: {len(different)} files differ, the first is {different[0]}.")
    out.add(
        {
            "case": case,
            "ours_s": sweep_s,
            "reference_s": single_s,
            "ratio": single_s / sweep_s,
            "max_rel_diff": 0.0,
            "different": 0,
            "peak_mb": None,
        }
    )
    out.table(COLUMNS)
    out.note("Times of whole commands, including imports and the start of Ray; images were cached.")


def _write_sweep(folder: Path, options: SweepOptions, seeds: int) -> Path:
    content = {
        "experiment": "benchmark",
        "seeds": list(range(1, seeds + 1)),
        "common": [
            f"federation.rounds={options.rounds}",
            f"data.images_per_class={options.images_per_class}",
            f"backbone.device={options.device}",
        ],
        "rows": {method: [f"method={method}"] for method in METHODS},
        "grid": {"partition.alpha": list(ALPHAS)},
    }
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def _run_one(run: PlannedRun, target: Path, environment: Mapping[str, str]) -> None:
    """Run `fedprompt run` on the config of a planned run."""
    target.mkdir(parents=True)
    file = target.parent / f"{target.name}.yaml"
    config = replace(run.config, output=replace(run.config.output, dir=str(target)))
    file.write_text(to_yaml(config), encoding="utf-8")
    _command(["run", str(file), "--quiet"], environment)


def _command(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedprompt", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(f"fedprompt {arguments[0]} ended with {done.stderr.strip()[-300:]}")


def _differences(planned: Sequence[PlannedRun], single: Path) -> list[str]:
    """Result files that are not byte-equal."""
    return [
        f"{run.name}/{name}"
        for run in planned
        for name in (METRICS, PROMPTS)
        if (run.folder / name).read_bytes() != (single / run.name / name).read_bytes()
    ]
