"""A sweep, or any runs, as one HTML file: table over seeds, charts, runs, settings.

The table is the one of `fedprompt compare`; the page is made like that of a run (report_page.py).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from fedprompt.data.sections import available
from fedprompt.errors import UserError
from fedprompt.reports.charts import ACCURACY, ROUND, Chart, Spec, box, curve, lines, palette
from fedprompt.reports.compare.figures import CURVES, client_accuracies, heat_values
from fedprompt.reports.compare.figures import curve as curve_of
from fedprompt.reports.compare.load import Row, differing, load_rows
from fedprompt.reports.compare.metrics import KNOWN, Metric, choose
from fedprompt.reports.compare.names import PLAN, plain
from fedprompt.reports.compare.table import MARK, Comparison, compare_rows, markdown, text
from fedprompt.reports.format import MISSING, human_time, percent
from fedprompt.reports.page import render

TEMPLATE = "sweep.html.j2"
AT_FIRST = 8
"""Curves that are shown before the reader switches others on: as many as there are colours."""
HEADLINES = ("personal", "global", "worst")
FACTS = ("method.name", "data.title", "backbone.model", "strategy.name", "federation.rounds")


def write_sweep_report(
    paths: Sequence[Path],
    out: Path,
    *,
    title: str | None = None,
    command: str | None = None,
    failed: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write the report of runs, or of folders of runs, into the file `out`; return it.

    `command` repeats the sweep, by default as its folder says; `failed` are names of runs and why
    they ended.

    Raises:
        UserError: nothing is finished, a run is damaged, or `out` cannot be written.
    """
    loaded = load_rows(paths)
    rows = loaded.rows
    if command is None and len(paths) == 1:
        command = _command(paths[0])
    metrics = choose(None, rows)
    table = compare_rows(rows, metrics)
    differ = differing(rows)
    several = [key for key in differ if _values(rows, key) > 1]
    content = {
        "title": title or _title(paths, out),
        "facts": _facts(rows),
        "notes": loaded.notes,
        "failed": failed,
        "headlines": _headlines(table),
        "columns": [metric.title for metric in metrics],
        "groups": list(zip(table.names, _cells(table), strict=True)),
        "table_note": table.note,
        "markdown": markdown(table),
        "runs": _runs(rows),
        "command": command,
        "differing": _settings(rows, several),
        "partial": _settings(rows, [key for key in differ if key not in several]),
        "common": _common(rows),
        "environment": _environment(rows),
    }
    html = render(TEMPLATE, sweep_charts(rows, metrics), content)
    try:
        out.write_text(html, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}.") from None
    return out


def _title(paths: Sequence[Path], out: Path) -> str:
    return paths[0].resolve().name if len(paths) == 1 else out.resolve().parent.name


def _command(folder: Path) -> str | None:
    """The line that made a sweep's folder; None for other folders. load_rows has read its plan."""
    path = folder / PLAN
    if not path.is_file():
        return None
    plan = json.loads(path.read_text(encoding="utf-8"))
    file = Path(str(plan.get("file")))
    words = ["fedprompt", "sweep", file.stem if file.stem in available("sweep") else str(file)]
    words += map(str, plan.get("overrides") or [])
    words += ["--seeds", ",".join(map(str, plan.get("seeds") or []))]
    quick = ["--quick"] if plan.get("sweep") == f"{file.stem}-quick" else []
    return shlex.join([*words, *quick, "--out", folder.name])


def sweep_charts(rows: Sequence[Row], metrics: Sequence[Metric]) -> list[Chart]:
    """Learning curves, accuracy over bytes, clients, and a map where two settings are swept."""
    found = [heat_chart(rows, metrics)]
    for over_bytes, (part, key, title) in product((False, True), reversed(CURVES)):
        found.append(curves_chart(rows, part, key, title, over_bytes=over_bytes))
    found.append(clients_chart(rows))
    return [chart for chart in found if chart is not None]


def curves_chart(
    rows: Sequence[Row], part: str, key: str, title: str, *, over_bytes: bool
) -> Chart | None:
    """One accuracy of every row per round, or over the bytes sent; mean and std over seeds."""
    curves = [curve_of(row, part, key) for row in rows]
    last = sorted((c.mean_R[-1] for c in curves if c.mean_R), reverse=True)
    least = last[min(AT_FIRST, len(last)) - 1] if last else 0.0
    series = []
    for i, (row, found) in enumerate(zip(rows, curves, strict=True)):
        x = found.bytes_R if over_bytes else [float(r) for r in found.rounds_R]
        # The axis of bytes is logarithmic; nothing is sent before the first round.
        kept = [k for k, value in enumerate(x) if value > 0 or not over_bytes]
        if not kept:
            continue
        seeds = len(row.runs) > 1
        one = curve(
            row.name,
            palette(i),
            [x[k] for k in kept],
            [found.mean_R[k] for k in kept],
            [found.std_R[k] for k in kept] if seeds else None,
            dash=i >= AT_FIRST,
            on=found.mean_R[-1] >= least,
        )
        series.append(one)
    if not series:
        return None
    x_axis: Spec = ROUND
    if over_bytes:
        x_axis = {"label": "Bytes up and down, all clients", "name": "after", "format": "bytes"}
        x_axis |= {"log": True}
    what = "bytes sent" if over_bytes else "rounds"
    caption = "Mean over seeds; band: ± 1 standard deviation over seeds."
    if len(series) > AT_FIRST:
        caption += f" The best {AT_FIRST} are shown; the names above switch the others on."
    return Chart(
        f"{part}_over_{'bytes' if over_bytes else 'rounds'}",
        f"{title} accuracy over {what}",
        caption,
        lines(series, x_axis, ACCURACY, nearest=over_bytes),
    )


def clients_chart(rows: Sequence[Row]) -> Chart | None:
    """Box plots of the clients' own accuracies, those of all seeds together."""
    values = [(i, row, client_accuracies(row)) for i, row in enumerate(rows)]
    groups = [box(row.name, palette(i), found) for i, row, found in values if found]
    if not groups:
        return None
    axis = {**ACCURACY, "label": "Accuracy on own test images"}
    return Chart(
        "clients",
        "Accuracy of the clients",
        "Last measured, clients of all seeds together; box: quartiles, notch: median, line: "
        "lowest to highest.",
        {"kind": "boxes", "groups": groups, "x": axis},
        wide=len(groups) > AT_FIRST,
    )


def heat_chart(rows: Sequence[Row], metrics: Sequence[Metric]) -> Chart | None:
    """Mean of the first of personalised and global accuracy, where just two settings differ."""
    keys = differing(rows)
    metric = next((m for m in (KNOWN["personal"], KNOWN["global"]) if m in metrics), None)
    if len(keys) != 2 or metric is None:
        return None
    try:
        across, down, table = heat_values(rows, (keys[0], keys[1]), metric)
    except UserError:  # a setting that not all rows have
        return None
    if 2 * len(rows) <= len(across) * len(down):
        return None  # two settings that change together
    spec: Spec = {
        "kind": "heat",
        "rows": [plain(value) for value in down],
        "columns": [plain(value) for value in across],
        "cells": [[None if v != v else float(v) for v in line] for line in table],
        "format": "percent",
        "color": "own",
        "name": metric.title,
        "none": MISSING,
        "x_name": keys[0],
        "y_name": keys[1],
        "x_label": keys[0],
    }
    title = f"{metric.title.capitalize()} accuracy over {keys[0]} and {keys[1]}"
    return Chart("heat", title, f"Mean over seeds; rows: {keys[1]}.", spec)


def _cells(table: Comparison) -> list[list[tuple[str, float | None, bool]]]:
    """Text, sort value and whether it is the best, of every cell."""
    return [
        [
            (_shown(metric, cell) + MARK * cell.differs, cell.mean, cell.best)
            for metric, cell in zip(table.metrics, line, strict=True)
        ]
        for line in table.cells
    ]


def _shown(metric: Metric, cell: Any) -> str:
    shown = text(metric, cell)
    return f"{shown} %" if metric.kind == "share" and shown != MISSING else shown


def _headlines(table: Comparison) -> list[tuple[str, str, str]]:
    """The best row of a few metrics, and how many runs there are."""
    found = []
    for name in HEADLINES:
        i = next((i for i, metric in enumerate(table.metrics) if metric.name == name), None)
        best = [k for k, line in enumerate(table.cells) if i is not None and line[i].best]
        if i is not None and best:
            metric = table.metrics[i]
            who = table.names[best[0]] + (" and others" if len(best) > 1 else "")
            label = f"Best {metric.title}"
            found.append((label, _shown(metric, table.cells[best[0]][i]), who))
    return found


def _facts(rows: Sequence[Row]) -> list[str]:
    runs = sum(len(row.runs) for row in rows)
    seeds = sorted({seed for row in rows for seed in row.runs})
    facts = [f"{runs} finished run{'s' * (runs != 1)}", f"{len(rows)} rows of the table"]
    facts.append(f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}")
    for key in FACTS:
        values = {plain(row.settings[key]) for row in rows if row.settings.get(key) is not None}
        if len(values) == 1:
            facts.append(f"{key.partition('.')[0].replace('federation', 'rounds')} {values.pop()}")
    return facts


def _runs(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line per run: its row, seed, folder, last results, seconds."""
    found = []
    for row in rows:
        for seed, run in sorted(row.runs.items()):
            summary = run.summary or {}
            personal = summary.get("personal") or {}
            wall = summary.get("wall_s")
            found.append(
                {
                    "row": row.name,
                    "seed": seed,
                    "folder": run.path.name,
                    "global": percent((summary.get("global") or {}).get("accuracy")),
                    "personal": percent(personal.get("mean")),
                    "worst": percent(personal.get("worst")),
                    "wall_s": wall,
                    "time": MISSING if wall is None else human_time(wall),
                }
            )
    return found


def _values(rows: Sequence[Row], key: str) -> int:
    """How many values a setting has among the rows that have it."""
    return len({repr(row.settings[key]) for row in rows if key in row.settings})


def _settings(rows: Sequence[Row], keys: Sequence[str]) -> list[tuple[str, str]]:
    """Each of these settings and what the rows have there, in their order."""
    shown = []
    for key in keys:
        values = dict.fromkeys(plain(row.settings[key]) for row in rows if key in row.settings)
        shown.append((key, ", ".join(values)))
    return shown


def _common(rows: Sequence[Row]) -> list[tuple[str, str]]:
    other = set(differing(rows))
    return [(k, plain(v)) for k, v in rows[0].settings.items() if k not in other]


def _environment(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Versions and devices, with every value that a run had."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for run in row.runs.values():
            parts: Mapping[str, Any] = (run.summary or {}).get("environment") or {}
            for key, value in parts.items():
                found.setdefault(str(key), {})[str(value)] = None
    return [(key, ", ".join(values)) for key, values in found.items()]
