"""Run every row of a table over several seeds and print it as Markdown.

    python scripts/run_table.py configs/sweep/readme_table.yaml [--seeds 1 2 3] [key=value ...]

A table file names an experiment, seeds and rows; a row is a list of overrides. Finished runs are
kept and interrupted ones go on. Mean and standard deviation (divide by n) are over seeds; a run
folder whose config differs from what the table asks for is refused.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from fedprompt.config import compose
from fedprompt.display import QuietDisplay
from fedprompt.errors import UserError
from fedprompt.experiment import resume, run
from fedprompt.run_folder import CONFIG, SUMMARY
from fedprompt.schema import Config

SILENT = QuietDisplay(Console(quiet=True))
COLUMNS = {
    "global": ("global", "accuracy"),
    "personalised": ("personal", "mean"),
    "worst client": ("personal", "worst"),
    "10th pct.": ("personal", "p10"),
    "personal on global test": ("personal_on_global", "mean"),
}


@dataclass(frozen=True)
class Table:
    """An experiment, seeds, and overrides by row name."""

    experiment: str
    seeds: list[int]
    rows: dict[str, list[str]]
    common: list[str]


def load_table(path: Path) -> Table:
    """The table that a YAML file describes."""
    raw = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(raw, dict)
    return Table(raw["experiment"], raw["seeds"], raw["rows"], raw.get("common", []))  # type: ignore[arg-type]


def row_config(table: Table, row: str, seed: int, extra: list[str], folder: Path) -> Config:
    """The complete config of one cell."""
    config = compose(table.experiment, [*table.common, *table.rows[row], *extra, f"seed={seed}"])
    return replace(config, output=replace(config.output, dir=str(folder)))


def summary_of(config: Config, folder: Path) -> dict[str, Any]:
    """The summary of one run; runs it, or goes on with it, where it is not finished."""
    if (folder / CONFIG).is_file():
        if compose(folder / CONFIG) != config:
            raise UserError(f"{folder} holds a run with another config; choose another --out.")
        resume(folder, SILENT)
    else:
        run(config, SILENT)
    summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text())
    return summary


def cell(values: list[float | None]) -> str:
    """Mean and standard deviation over seeds, in percent."""
    known = [100 * v for v in values if v is not None]
    return f"{fmean(known):.1f} ± {pstdev(known):.1f}" if known else "-"


def main() -> None:
    """Run the table and print it."""
    parser = argparse.ArgumentParser(description="Run a table of experiments over seeds.")
    parser.add_argument("table", type=Path, help="e.g. configs/sweep/readme_table.yaml")
    parser.add_argument("overrides", nargs="*", help="changes to every run, key=value")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    table = load_table(arguments.table)
    seeds = arguments.seeds or table.seeds
    out = arguments.out or Path("runs") / arguments.table.stem
    print(f"| method | {' | '.join(COLUMNS)} | numbers up |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for name in table.rows:
        stem = re.sub(r"\W+", "-", name.lower()).strip("-")
        runs = []
        for seed in seeds:
            folder = out / f"{stem}-seed{seed}"
            config = row_config(table, name, seed, arguments.overrides, folder)
            runs.append(summary_of(config, folder))
        cells = [cell([(r[part] or {}).get(key) for r in runs]) for part, key in COLUMNS.values()]
        numbers = f"{runs[0]['uploaded_numbers_per_client_round']:,}"
        print(f"| {name} | {' | '.join(cells)} | {numbers} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"run_table: {error}\n")
        sys.exit(2)
