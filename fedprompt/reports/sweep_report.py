"""The report of a sweep or of any runs as one HTML file: table over seeds, figures and settings.

Table and figures are those of `fedprompt compare`; the page is rendered like a run's (`page.py`).
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedprompt.data.sections import available
from fedprompt.errors import UserError
from fedprompt.files import refuse_foreign, write_bytes
from fedprompt.reports.compare.cells import cells_of, method_names
from fedprompt.reports.compare.figures import comparison_figures, heat_figure, swept_settings
from fedprompt.reports.compare.load import Row, differing, load_rows
from fedprompt.reports.compare.metrics import KNOWN, Metric, choose
from fedprompt.reports.compare.names import PLAN, plain
from fedprompt.reports.compare.notes import MARK
from fedprompt.reports.compare.pivot import pivots
from fedprompt.reports.compare.statistics import Cell
from fedprompt.reports.compare.table import Comparison, compare_rows, markdown, text
from fedprompt.reports.figure import Figure
from fedprompt.reports.format import MISSING, human_time, percent, plural
from fedprompt.reports.page import MARKS, render

TEMPLATE = "sweep.html.j2"
HEADLINES = ("personal", "global", "worst")
"""Metrics whose best row is shown at the top of the page."""
FACTS = ("method.name", "data.title", "backbone.model", "strategy.name", "federation.rounds")
"""Settings that the page's head names if all runs agree on them."""


def write_sweep_report(
    paths: Sequence[Path],
    out: Path,
    *,
    title: str | None = None,
    command: str | None = None,
    failed: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write the report of several runs, e.g. of a sweep.

    Args:
        paths: Run folders, folders of sweeps, or folders of runs.
        out: The HTML file.
        title: The title of the page; by default the name of the only path, else of `out`'s folder.
        command: The command that repeats the sweep; by default the one recorded in its folder.
        failed: Names of failed runs and why they failed.

    Returns:
        The path of the file.

    Raises:
        UserError: No run is finished, a run is damaged, or `out` cannot be written or is not a
            report.
    """
    refuse_foreign(out, *MARKS)
    loaded = load_rows(paths)
    rows = loaded.rows
    if command is None and len(paths) == 1:
        command = _command(paths[0])
    metrics = choose(None, rows)
    table = compare_rows(rows, metrics)
    differ = differing(rows)
    # Keys with one value differ only in that some methods lack them; they are listed separately.
    several = [key for key in differ if _count_values(rows, key) > 1]
    content = {
        "title": title or _title(paths, out),
        "facts": _facts(rows),
        "notes": loaded.notes,
        "failed": failed,
        "headlines": _headlines(table, rows),
        "tables": [
            {
                "title": one.title,
                "columns": [metric.title for metric in one.metrics],
                "groups": list(zip(one.names, _cells(one), strict=True)),
                "note": one.note,
                "markdown": markdown(one),
            }
            for one in (table, *pivots(table, rows))
        ],
        "runs": _runs(rows),
        "command": command,
        "differing": _settings(rows, several),
        "partial": _settings(rows, [key for key in differ if key not in several]),
        "common": _common(rows),
        "environment": _environment(rows),
    }
    html = render(TEMPLATE, sweep_figures(rows, metrics), content)
    try:
        write_bytes(out, html.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}.") from None
    return out


def _title(paths: Sequence[Path], out: Path) -> str:
    return paths[0].resolve().name if len(paths) == 1 else out.resolve().parent.name


def _command(folder: Path) -> str | None:
    """Return the command that created a sweep's folder, None for other folders.

    The plan has already been read by `load_rows`, so it is known to be intact.
    """
    path = folder / PLAN
    if not path.is_file():
        return None
    plan = json.loads(path.read_text(encoding="utf-8"))
    file = Path(str(plan.get("file")))
    # Shipped sweeps are repeated by name, since their path belongs to this installation.
    words = ["fedprompt", "sweep", file.stem if file.stem in available("sweep") else str(file)]
    words += map(str, plan.get("overrides") or [])
    words += ["--seeds", ",".join(map(str, plan.get("seeds") or []))]
    quick = ["--quick"] if plan.get("sweep") == f"{file.stem}-quick" else []
    directory = plan.get("directory")
    command = shlex.join([*words, *quick, "--out", str(plan.get("out") or folder.name)])
    # Relative paths in the command start where it was given.
    return f"cd {shlex.quote(str(directory))} && {command}" if directory else command


def sweep_figures(rows: Sequence[Row], metrics: Sequence[Metric]) -> list[Figure]:
    """Describe the figures of a comparison, after a heat map if just two settings are swept.

    Args:
        rows: The rows of the comparison.
        metrics: Its columns; the map shows personalised accuracy, or else global accuracy.
    """
    figures = comparison_figures(rows)
    keys = swept_settings(rows)
    metric = next((m for m in (KNOWN["personal"], KNOWN["global"]) if m in metrics), None)
    if keys is not None and metric is not None:
        figures.insert(0, heat_figure(rows, keys, metric))
    return figures


def _cells(table: Comparison) -> list[list[tuple[str, float | None, bool]]]:
    """Return for every cell its text, its value for sorting, and whether it is the best."""
    return [
        [
            (_text(metric, cell) + MARK * cell.differs, cell.mean, cell.best)
            for metric, cell in zip(table.metrics, line, strict=True)
        ]
        for line in table.cells
    ]


def _text(metric: Metric, cell: Cell) -> str:
    number = text(metric, cell)
    return f"{number} %" if metric.kind == "share" and number != MISSING else number


def _headlines(table: Comparison, rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Return the best row of a few metrics: label, value and the row's name.

    With several conditions (see `compare/cells.py`) no single row is the best, so the method is
    named that is the best under most of them.
    """
    headlines = []
    compared = [cell for cell in cells_of(rows) if len(cell) > 1]
    methods = method_names(rows)
    for name in HEADLINES:
        i = next((i for i, metric in enumerate(table.metrics) if metric.name == name), None)
        best = [k for k, line in enumerate(table.cells) if i is not None and line[i].best]
        if i is None or not best:
            continue
        metric = table.metrics[i]
        if len(compared) == 1:
            value, who = _text(metric, table.cells[best[0]][i]), table.names[best[0]]
            more = len(best) > 1
        else:
            times = Counter(methods[k] for k in best)
            (who, most), *others = times.most_common()
            value = f"in {most} of {len(compared)} conditions"
            more = any(number == most for _, number in others)
        headlines.append((f"Best {metric.title}", value, who + (" and others" if more else "")))
    return headlines


def _facts(rows: Sequence[Row]) -> list[str]:
    runs = sum(len(row.runs) for row in rows)
    seeds = sorted({seed for row in rows for seed in row.runs})
    facts = [f"{plural(runs, 'finished run')}", f"{plural(len(rows), 'row')} of the table"]
    facts.append(f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}")
    for key in FACTS:
        values = {plain(row.settings[key]) for row in rows if row.settings.get(key) is not None}
        # A setting that differs between rows is part of their names instead.
        if len(values) == 1:
            facts.append(f"{key.partition('.')[0].replace('federation', 'rounds')} {values.pop()}")
    return facts


def _runs(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return one line per run: its row, seed, folder, final results and wall time in seconds."""
    lines = []
    for row in rows:
        for seed, run in sorted(row.runs.items()):
            summary = run.summary or {}
            personal = summary.get("personal") or {}
            wall = summary.get("wall_s")
            lines.append(
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
    return lines


def _count_values(rows: Sequence[Row], key: str) -> int:
    """Count the values of a setting among the rows that have it."""
    return len({repr(row.settings[key]) for row in rows if key in row.settings})


def _settings(rows: Sequence[Row], keys: Sequence[str]) -> list[tuple[str, str]]:
    """Return each of these settings with the values that the rows have."""
    settings = []
    for key in keys:
        values = dict.fromkeys(plain(row.settings[key]) for row in rows if key in row.settings)
        settings.append((key, ", ".join(values)))
    return settings


def _common(rows: Sequence[Row]) -> list[tuple[str, str]]:
    differ = set(differing(rows))
    return [(k, plain(v)) for k, v in rows[0].settings.items() if k not in differ]


def _environment(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return versions and devices; if runs differ, every value."""
    # A dictionary without values serves as a set that keeps its order.
    values_of: dict[str, dict[str, None]] = {}
    for row in rows:
        for run in row.runs.values():
            parts: Mapping[str, Any] = (run.summary or {}).get("environment") or {}
            for key, value in parts.items():
                values_of.setdefault(str(key), {})[str(value)] = None
    return [(key, ", ".join(values)) for key, values in values_of.items()]
