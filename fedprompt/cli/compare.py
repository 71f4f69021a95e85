"""What `fedprompt compare` prints and writes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from rich.console import Console

from fedprompt.errors import UserError, did_you_mean
from fedprompt.files import refuse_foreign, write_bytes
from fedprompt.reports.compare.figures import comparison_figures, heat_figure
from fedprompt.reports.compare.load import Loaded, Row, load_rows
from fedprompt.reports.compare.metrics import KNOWN, Metric, choose
from fedprompt.reports.compare.pivot import USUAL, pivots
from fedprompt.reports.compare.statistics import Test
from fedprompt.reports.compare.table import (
    Comparison,
    comma_separated,
    compare_rows,
    latex,
    markdown,
    terminal,
)
from fedprompt.reports.draw import MARK, save_all
from fedprompt.reports.figure import Figure
from fedprompt.reports.format import Table
from fedprompt.reports.result_tables import protocol_tables

FORMS: dict[str, Callable[[Comparison], str]] = {
    "markdown": markdown,
    "csv": comma_separated,
    "latex": latex,
}
"""Formats of the table other than the terminal's."""
STARTS = {"markdown": b"|  | ", "csv": b"row,", "latex": b"% \\usepackage{booktabs}"}
"""What our tables contain near their beginning, in each of these formats."""
SUFFIXES = {"markdown": "md", "csv": "csv", "latex": "tex"}


def compare_command(
    paths: Sequence[Path],
    *,
    metrics: str | None,
    form: str,
    test: str,
    where: Sequence[str],
    pivot: str | None,
    heat: tuple[str, str] | None,
    out: Path | None,
    protocol: str | None,
) -> None:
    """Print the table of a comparison, and write tables and figures if a folder is given.

    Args:
        paths: Run folders, or folders of sweeps.
        metrics: The columns, separated by commas; None selects those that the runs have.
        form: `terminal`, or a key of `FORMS`.
        test: The significance test: `t`, `wilcoxon` or `none`.
        where: Settings `KEY=VALUE` that a run must have to be compared.
        pivot: Metrics, separated by commas, of which only the tables of methods by conditions are
            printed; None prints those of the usual metrics below the table.
        heat: Two settings whose combinations a heat map shows.
        out: The folder for tables and figures.
        protocol: The protocol whose own comparison is printed instead.

    Raises:
        UserError: An option is invalid, or there is no finished run to compare.
    """
    # Options are checked before the runs are read, which takes a while for many of them.
    _check(form, ["terminal", *FORMS], "--format")
    _check(test, ["t", "wilcoxon", "none"], "--test")
    if heat is not None and out is None:
        raise UserError("compare: --heat draws a figure; give its folder with --out FOLDER.")
    loaded = load_rows(paths, where)
    if protocol is not None:
        _compare_protocol(protocol, loaded, out)
        return
    columns = choose(pivot or metrics, loaded.rows)
    tables = tables_of(loaded.rows, columns, cast("Test", test))
    if pivot is not None:
        tables = tables[1:]
        if not tables:
            raise UserError(
                "compare: --pivot: no method was run under several conditions (data sets, "
                "partitions, values of a grid), so there is no table of methods by conditions."
            )
    if form == "terminal":
        print_tables(tables, Console(highlight=False))
    else:
        # A file of comma-separated values holds one table; --pivot and --out write the others.
        shown = tables[:1] if form == "csv" and pivot is None else tables
        sys.stdout.write("\n".join(FORMS[form](table) for table in shown))
    # On stderr, so that a table piped into a file contains nothing else.
    for note in loaded.notes:
        sys.stderr.write(f"{note}\n")
    if out is not None:
        for path in write_all(out, tables, loaded.rows, heat, columns):
            sys.stderr.write(f"wrote {path}\n")


def tables_of(rows: Sequence[Row], columns: Sequence[Metric], test: Test = "t") -> list[Comparison]:
    """Return the table of a comparison, then those of methods by conditions, if there are any.

    Args:
        rows: The rows of the comparison.
        columns: The metrics. Those of the usual ones among them have a table of methods by
            conditions, or all of them if none is usual.
        test: The significance test.
    """
    table = compare_rows(rows, columns, test)
    names = [metric.name for metric in columns]
    chosen = [name for name in USUAL if name in names] if len(names) > len(USUAL) else names
    return [table, *pivots(table, rows, test, chosen)]


def print_tables(tables: Sequence[Comparison], console: Console) -> None:
    """Print tables below each other; in a file, where nothing can be bold, the best are marked."""
    for table in tables:
        console.print(terminal(table, console.width, bold=console.is_terminal))


def print_sweep(folder: Path, console: Console, protocol: str | None = None) -> None:
    """Print the table of a sweep's finished runs, and a protocol's own comparison of them.

    Args:
        folder: The folder of the sweep.
        console: Where to print.
        protocol: The protocol; None for none.
    """
    rows = load_rows([folder]).rows
    print_tables(tables_of(rows, choose(None, rows)), console)
    if protocol is not None:
        table, _ = _protocol_table(protocol, rows)
        for one in protocol_tables([table], console.width):
            console.print(one)


def write_all(
    out: Path,
    tables: Sequence[Comparison],
    rows: Sequence[Row],
    heat: tuple[str, str] | None,
    columns: Sequence[Metric],
) -> list[Path]:
    """Write the tables in three formats, and every figure that there is data for.

    Args:
        out: The folder, which is created if necessary.
        tables: The comparison, then its tables of methods by conditions.
        rows: Its rows, for the figures.
        heat: Two settings for a heat map; None for no map.
        columns: The metrics of the table; the map shows personalised accuracy if it is one of them.

    Returns:
        The paths of the files.

    Raises:
        UserError: The folder cannot be written or holds other files of these names, or no heat map
            can be drawn.
    """
    figures = comparison_figures(rows)
    if heat is not None:
        metric = KNOWN["personal"] if KNOWN["personal"] in columns else columns[0]
        figures.append(heat_figure(rows, heat, metric))
    written = []
    # All are checked before the first is written.
    for form, mark in STARTS.items():
        refuse_foreign(out / f"table.{SUFFIXES[form]}", mark)
    for figure in figures:
        refuse_foreign(out / f"{figure.name}.png", MARK)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for table in tables:
            stem = f"{table.name}_by_condition" if table.name else "table"
            for form, make in FORMS.items():
                path = out / f"{stem}.{SUFFIXES[form]}"
                write_bytes(path, make(table).encode("utf-8", "backslashreplace"))
                written.append(path)
        written += save_all(figures, out)
    except OSError as error:
        raise UserError(f"compare: cannot write to {out}: {error.strerror}.") from None
    return written


def _compare_protocol(name: str, loaded: Loaded, out: Path | None) -> None:
    """Print and write the comparison that a protocol itself makes of single runs."""
    table, figure = _protocol_table(name, loaded.rows)
    sys.stdout.write(f"{table.markdown()}\n\n{table.note}\n")
    if out is not None:
        refuse_foreign(out / f"{name}.md", b"| ")
        refuse_foreign(out / f"{figure.name}.png", MARK)
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_bytes(out / f"{name}.md", f"{table.markdown()}\n\n{table.note}\n".encode())
            for path in save_all([figure], out):
                sys.stderr.write(f"wrote {path}\n")
        except OSError as error:
            raise UserError(f"compare: cannot write to {out}: {error.strerror}.") from None


def _protocol_table(name: str, rows: Sequence[Row]) -> tuple[Table, Figure]:
    """The comparison that a protocol makes of the runs of some rows."""
    # Protocols import PyTorch, which the other comparisons do not need.
    from fedprompt.evaluation.registry import compare_runs

    runs = [(run, row.label or run.path.name) for row in rows for run in row.runs.values()]
    return compare_runs(name, [run for run, _ in runs], [label for _, label in runs])


def _check(value: str, known: Sequence[str], option: str) -> None:
    if value not in known:
        raise UserError(f"compare: {option} {value!r} is unknown.{did_you_mean(value, [*known])}")
