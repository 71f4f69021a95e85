"""A small sweep file, the runs that it plans, and folders that look like those of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from fedprompt.config.schema import to_yaml
from fedprompt.data.sections import available
from fedprompt.reports.run_data import CONFIG, SUMMARY
from fedprompt.sweeps.plan import PlannedRun, expand, load_sweep

TINY = [
    "data.images_per_class=8", "data.domains=[savanna]", "partition.clients=3",
    "partition.alpha=1", "federation.rounds=1", "training.batch_size=8",
    "output.report=false",
]  # fmt: skip
BASE: dict[str, Any] = {
    "experiment": "benchmark",
    "seeds": [1, 2],
    "common": TINY,
    "rows": {"PromptFL": ["method=promptfl"], "FedRSCLIP [x]": []},
    "grid": {"training.lr": [0.02, 0.1]},
}
SHIPPED = available("sweep")


def write(folder: Path, **changes: Any) -> Path:
    """Write `BASE` with some keys changed; None leaves a key out."""
    path = folder / "table.yaml"
    content = {k: v for k, v in {**BASE, **changes}.items() if v is not None}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def plan(folder: Path, *overrides: str, **changes: Any) -> list[PlannedRun]:
    """The runs of `BASE` with some keys changed, in `folder/out`."""
    sweep = load_sweep(write(folder, **changes), quick="quick" in changes)
    return expand(sweep, folder / "out", overrides)


def fake_run(run: PlannedRun, rounds: int, seconds: float | None) -> None:
    """The files that say how far a run is."""
    run.folder.mkdir(parents=True)
    (run.folder / CONFIG).write_text(to_yaml(run.config))
    lines = [json.dumps({"round": r, "train_s": 1, "evaluate_s": 1}) for r in range(rounds)]
    (run.folder / "timings.jsonl").write_text("\n".join([*lines, '{"round": 9']))
    if seconds is not None:
        parts = {"global": {"accuracy": 0.612}, "personal": {"mean": 0.789}}
        (run.folder / SUMMARY).write_text(json.dumps({"wall_s": seconds, **parts}))
