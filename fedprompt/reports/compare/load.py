"""Finished runs grouped into the rows of a table: runs that differ in their seed alone.

A folder of a sweep (it holds sweep.json) brings its rows with the names of its file; runs in it
that the sweep's last plan does not name are left out. Any other runs are named by the settings in
which they differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fedprompt.errors import UserError
from fedprompt.reports.compare.names import PLAN, describe, plain
from fedprompt.reports.run_data import CONFIG, SUMMARY, RunData, load_run


@dataclass
class Row:
    """Runs of the same settings, by seed; `settings` are the flat keys of their config."""

    name: str
    source: str
    settings: dict[str, Any]
    runs: dict[int, RunData] = field(default_factory=dict)


@dataclass
class Loaded:
    """Rows in order, and remarks about what was left out."""

    rows: list[Row]
    notes: list[str]


def load_rows(paths: Sequence[Path], where: Sequence[str] = ()) -> Loaded:
    """The finished runs in run folders, sweeps and folders of runs.

    `where` keeps those with `KEY=VALUE` in their config.

    Raises:
        UserError: a path holds no run, nothing is finished, or a file is damaged.
    """
    wanted = [_condition(text) for text in where]
    rows: dict[str, Row] = {}
    unfinished = twice = 0
    notes = []
    for path in paths:
        if path.name == PLAN:
            continue  # of runs/x/*
        found = _named_runs(path)
        if found.left_out:
            notes.append(f"{path}: {found.left_out} runs of other plans are left out.")
        for folder, name in found.runs:
            if not (folder / SUMMARY).is_file():
                unfinished += 1
                continue
            run = load_run(folder)
            flat = flatten(run.config)
            if not all(_same(plain(flat.get(key)), value) for key, value in wanted):
                continue
            # Runs of one row differ in their seed, and in where and how results are kept.
            settings = {
                k: v for k, v in flat.items() if k != "seed" and not k.startswith("output.")
            }
            key = json.dumps([str(path) if name else "", settings], sort_keys=True, default=str)
            row = rows.setdefault(key, Row(name, path.name, settings))
            seed = int(flat.get("seed", 0))
            twice += seed in row.runs
            row.runs.setdefault(seed, run)
    if unfinished:
        notes.append(f"{unfinished} runs are not finished and are left out.")
    if twice:
        notes.append(f"{twice} runs repeat another one and are left out.")
    if not rows:
        why = f" with {', '.join(where)}" if where else ""
        raise UserError(f"compare: no finished run{why} in {', '.join(map(str, paths))}.")
    named = list(rows.values())
    _name(named)
    return Loaded(named, notes)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"partition": {"alpha": 1}}` as `{"partition.alpha": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differing(rows: Sequence[Row]) -> list[str]:
    """Settings in which some rows differ, `method.name` first."""
    keys = dict.fromkeys(key for row in rows for key in row.settings)
    return sorted(
        (k for k in keys if len({repr(row.settings.get(k)) for row in rows}) > 1),
        key=lambda k: k != "method.name",
    )


@dataclass(frozen=True)
class _Found:
    runs: list[tuple[Path, str]]
    left_out: int = 0


def _named_runs(path: Path) -> _Found:
    """Run folders in `path` with the names of their rows, "" where they have none."""
    if (path / CONFIG).is_file():
        return _Found([(path, "")])
    if not path.is_dir():
        raise UserError(f"compare: there is no folder {path}.")
    inside = sorted(p for p in path.iterdir() if (p / CONFIG).is_file())
    if (path / PLAN).is_file():
        try:
            plan = json.loads((path / PLAN).read_text(encoding="utf-8"))
            runs = [(path / run["name"], _row_name(run)) for run in plan["runs"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path / PLAN} is damaged ({type(error).__name__}: {error}); the sweep's command "
                "writes it anew."
            ) from None
        return _Found(runs, len(set(inside) - {folder for folder, _ in runs}))
    if not inside:
        raise UserError(f"compare: {path} holds no run.")
    return _Found([(folder, "") for folder in inside])


def _row_name(run: Mapping[str, Any]) -> str:
    return ", ".join(filter(None, (run["row"], describe(run["values"])))) or "all"


def _name(rows: Sequence[Row]) -> None:
    """Names for rows that have none, and different ones for all."""
    nameless = [row for row in rows if not row.name]
    # Keys that not all rows have belong to their method, whose name says as much.
    keys = [k for k in differing(rows) if all(k in row.settings for row in rows)]
    for row in nameless:
        parts = [
            plain(row.settings[k])
            if k.endswith(".name")
            else f"{k.rpartition('.')[2]} {plain(row.settings[k])}"
            for k in keys
        ]
        row.name = ", ".join(parts) or plain(row.settings.get("method.name", "run"))
    names = [row.name for row in rows]
    for row in rows:
        if names.count(row.name) > 1:
            row.name = f"{row.source}: {row.name}"
    names = [row.name for row in rows]
    for i, row in enumerate(rows):
        if row.name in names[:i]:
            row.name = f"{row.name} ({names[:i].count(row.name) + 1})"


def _same(found: str, wanted: str) -> bool:
    """Whether two plain values agree: as numbers where both are, else letter by letter."""
    try:
        return float(found) == float(wanted)
    except ValueError:
        return found == wanted


def _condition(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"compare: --where {text!r} is not KEY=VALUE, e.g. partition.alpha=0.1.")
    return key.strip(), plain(OmegaConf.to_container(OmegaConf.from_dotlist([f"v={value}"]))["v"])  # type: ignore[index,call-overload]
