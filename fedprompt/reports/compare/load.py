"""Reads finished runs and groups them into rows: the runs of a row differ only in their seed.

The folder of a sweep (it contains sweep.json) contributes rows with the names of its file; runs in
it that the sweep's latest plan does not list are left out. All other runs are named by the settings
in which they differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedprompt.config.as_typed import plain as without_texts
from fedprompt.config.as_typed import read_override
from fedprompt.errors import UserError
from fedprompt.reports.compare.names import PLAN, describe, plain
from fedprompt.reports.format import plural
from fedprompt.reports.run_data import CONFIG, SUMMARY, RunData, load_run
from fedprompt.reports.score_names import one_name

CHOSEN_BY = "evaluation.chosen_by"
"""The setting that says which search chose the others."""


@dataclass
class Row:
    """One row of a comparison: the runs of the same settings.

    Attributes:
        name: What the row is called in tables and legends.
        source: The name of the folder it was found in, which tells rows of the same name apart.
        settings: The flattened config of its runs, without the seed and `output`.
        label: What its sweep's file calls the row; empty for runs of no sweep.
        grid: The values of its sweep's grid by key; empty for runs of no sweep.
        runs: The runs by seed.
    """

    name: str
    source: str
    settings: dict[str, Any]
    label: str = ""
    grid: Mapping[str, Any] = field(default_factory=dict)
    runs: dict[int, RunData] = field(default_factory=dict)


@dataclass
class Loaded:
    """The rows of a comparison in order, and remarks about what was left out."""

    rows: list[Row]
    notes: list[str]


def load_rows(paths: Sequence[Path], where: Sequence[str] = ()) -> Loaded:
    """Read the finished runs in some folders and group them into rows.

    Args:
        paths: Run folders, folders of sweeps, or folders of runs.
        where: Conditions `KEY=VALUE`; only runs whose config meets all of them are used.

    Returns:
        The rows in the order of the paths, with a different name each, and remarks for the user.

    Raises:
        UserError: A path contains no run, no run is finished, or a file is damaged.
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
            verb = "is" if found.left_out == 1 else "are"
            notes.append(f"{path}: {plural(found.left_out, 'run')} of other plans {verb} left out.")
        for folder, planned in found.runs:
            if not (folder / SUMMARY).is_file():
                unfinished += 1
                continue
            # Only finished runs are read, because `load_run` refuses a run that has no round yet.
            run = load_run(folder, history=False, describe=False)
            flat = flatten(run.config)
            if not all(
                any(_same(plain(flat.get(key)), value) for value in values)
                for key, values in wanted
            ):
                continue
            # The runs of a row differ only in their seed, and in where and how results are stored.
            settings = {
                k: v for k, v in flat.items() if k != "seed" and not k.startswith("output.")
            }
            # Rows of a sweep keep to themselves: equal settings in another folder may be named
            # differently.
            key = json.dumps([str(path) if planned else "", settings], sort_keys=True, default=str)
            row = rows.setdefault(key, _row(planned, path.name, settings))
            seed = int(flat.get("seed", 0))
            twice += seed in row.runs
            row.runs.setdefault(seed, run)
    if unfinished:
        verb = "is" if unfinished == 1 else "are"
        notes.append(f"{plural(unfinished, 'run')} {verb} not finished and {verb} left out.")
    if twice:
        repeat = "repeats another one and is" if twice == 1 else "repeat other ones and are"
        notes.append(f"{plural(twice, 'run')} {repeat} left out.")
    if not rows:
        why = f" with {', '.join(where)}" if where else ""
        raise UserError(f"compare: no finished run{why} in {', '.join(map(str, paths))}.")
    named = list(rows.values())
    _name(named)
    return Loaded(named, notes)


def score_of(rows: Sequence[Row]) -> str:
    """Return what the scores of some rows are called: `accuracy`, `mAP` or `accuracy or mAP`."""
    return one_name(run.score for row in rows for run in row.runs.values())


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"partition": {"alpha": 1}}` as `{"partition.alpha": 1}`.

    Args:
        config: A nested config.
        prefix: What every key begins with.
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differing(rows: Sequence[Row]) -> list[str]:
    """Return the settings in which the rows differ, `method.name` first."""
    # A remark on how the settings were found is none of them, and too long for a name.
    keys = dict.fromkeys(key for row in rows for key in row.settings if key != CHOSEN_BY)
    return sorted(
        # `repr` because 1, 1.0 and True are equal in Python but not as settings.
        (k for k in keys if len({repr(row.settings.get(k)) for row in rows}) > 1),
        key=lambda k: k != "method.name",
    )


@dataclass(frozen=True)
class _Found:
    """Run folders with their entries in a sweep's plan, and how many folders were left out."""

    runs: list[tuple[Path, Mapping[str, Any] | None]]
    left_out: int = 0


def _named_runs(path: Path) -> _Found:
    """Find the run folders in `path`, with their entries in its plan if it is a sweep's folder."""
    if (path / CONFIG).is_file():
        return _Found([(path, None)])
    if not path.is_dir():
        raise UserError(f"compare: there is no folder {path}.")
    inside = sorted(p for p in path.iterdir() if (p / CONFIG).is_file())
    if (path / PLAN).is_file():
        try:
            plan = json.loads((path / PLAN).read_text(encoding="utf-8"))
            runs = [(path / run["name"], run) for run in plan["runs"]]
            for _, run in runs:
                _row(run, "", {})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path / PLAN} is damaged ({type(error).__name__}: {error}); the sweep's command "
                "writes it anew."
            ) from None
        return _Found(runs, len(set(inside) - {folder for folder, _ in runs}))
    if not inside:
        raise UserError(f"compare: {path} holds no run.")
    return _Found([(folder, None) for folder in inside])


def _row(planned: Mapping[str, Any] | None, source: str, settings: dict[str, Any]) -> Row:
    """Create a row without runs; it has a name only if a sweep's plan names it."""
    if planned is None:
        return Row("", source, settings)
    label, grid = str(planned["row"]), dict(planned["values"])
    name = ", ".join(filter(None, (label, describe(grid)))) or "all"
    return Row(name, source, settings, label, grid)


def _name(rows: Sequence[Row]) -> None:
    """Name the rows that have no name, and make all names different."""
    nameless = [row for row in rows if not row.name]
    # A key that only some rows have belongs to their method, whose name already tells them apart.
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
    """Return whether two plain values agree, as numbers if both are numbers, else as text."""
    try:
        return float(found) == float(wanted)
    except ValueError:
        return found == wanted


def _condition(text: str) -> tuple[str, tuple[str, str]]:
    """Parse `KEY=VALUE` the way a config is parsed, so that `lr=2e-3` matches 0.002.

    Returns:
        The key, and its value as YAML reads it and as typed: the type of the key decides which of
        them a config holds.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"compare: --where {text!r} is not KEY=VALUE, e.g. partition.alpha=0.1.")
    parsed = read_override(text, key.strip(), value)
    return key.strip(), (plain(without_texts(parsed)), value.strip())
