"""The table of a comparison, and the four formats in which it is written."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

from rich.console import Group
from rich.text import Text

from fedprompt.reports.compare.cells import cells_of
from fedprompt.reports.compare.load import Row
from fedprompt.reports.compare.metrics import Metric
from fedprompt.reports.compare.notes import MARK, reading_note
from fedprompt.reports.compare.statistics import Cell, Test, column
from fedprompt.reports.format import MISSING
from fedprompt.reports.terminal import Field, fitted

BEST_MARK = "^"
NAME = 26
"""Maximum width of the first column in a terminal, in characters; longer names are wrapped."""
HEAD, ROOMY = 12, 3
"""In LaTeX: line length of a heading in characters, and the number of columns above which the table
is set in a smaller font."""
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$",
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """A table: a name per row, a cell per row and metric.

    Attributes:
        metrics: The columns.
        names: The names of the rows.
        cells: A cell per row and column.
        note: How to read it.
        title: What it shows, for a table that stands below another one.
        name: The metric of all columns, for a table of methods by conditions.
    """

    metrics: tuple[Metric, ...]
    names: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]
    note: str
    title: str = ""
    name: str = ""


def compare_rows(rows: Sequence[Row], metrics: Sequence[Metric], test: Test = "t") -> Comparison:
    """Compute mean, deviation, best row and significance of every metric.

    Only rows of the same cell are compared (see `cells.py`): accuracies on two data sets, or on an
    easy and a hard partition, say nothing about the methods.

    Args:
        rows: The rows of the comparison.
        metrics: The columns.
        test: The significance test of every row against the best one of its cell.
    """
    lines: list[list[Cell]] = [[] for _ in rows]
    groups = cells_of(rows)
    for m in metrics:
        for group in groups:
            values = [m.by_seed(rows[i]) for i in group]
            found = column(values, higher_is_better=m.higher_is_better, test=test)
            for i, cell in zip(group, found, strict=True):
                lines[i].append(cell)
    cells = tuple(map(tuple, lines))
    note = reading_note(rows, cells, test)
    return Comparison(tuple(metrics), tuple(row.name for row in rows), cells, note)


def number(metric: Metric, value: float) -> str:
    """Format one number of a metric, without a unit."""
    if metric.kind == "share":
        return f"{100 * value:.1f}"
    if metric.kind == "count":
        return f"{value:,.0f}"
    if metric.kind == "bytes":
        return f"{value / 2**20:.2f}"
    if metric.kind == "seconds":
        return f"{value:,.1f}"
    return f"{value:.4g}"


def text(metric: Metric, cell: Cell) -> str:
    """Format mean and deviation of a cell.

    The mean stands alone with a single seed, and for a cost that is the same for all seeds.
    """
    if cell.mean is None:
        return MISSING
    mean = number(metric, cell.mean)
    if cell.std is None:
        return mean
    std = number(metric, cell.std)
    # Compared as printed, so that rounding decides whether a cost is the same for all seeds.
    constant = metric.higher_is_better is None and std == number(metric, 0)
    return mean if constant else f"{mean} ± {std}"


def terminal(table: Comparison, width: int = 200, *, bold: bool = True) -> Group:
    """Lay out the table for rich; columns that do not fit continue in a further table below.

    Args:
        table: The comparison.
        width: Width of the terminal, in characters.
        bold: Whether the best cells are bold. If not, as in a file, they are marked with `^`.
    """
    mark, note = "", table.note
    if not bold:
        mark, note = BEST_MARK, note.replace("Bold: best mean", f"{BEST_MARK}: best mean")

    def shown(metric: Metric, cell: Cell) -> Text:
        marks = mark * cell.best + MARK * cell.differs
        return Text(text(metric, cell) + marks, style="bold" if cell.best else "")

    names = Field("", [Text(name) for name in table.names], most=NAME, right=False)
    columns = [
        Field(
            metric.title,
            [shown(metric, cell) for cell in column],
        )
        for metric, column in zip(table.metrics, zip(*table.cells, strict=True), strict=True)
    ]
    return fitted(names, columns, width, title=table.title, note=note)


def markdown(table: Comparison) -> str:
    """Format the table and its note as Markdown."""

    def cell(metric: Metric, value: Cell) -> str:
        shown = text(metric, value)
        return f"**{shown}**" if value.best else shown + "\\" * value.differs + MARK * value.differs

    heads = ["", *(m.title for m in table.metrics)]
    lines = [heads, ["---"] * len(heads)]
    for name, line in zip(table.names, table.cells, strict=True):
        cells = [cell(m, c) for m, c in zip(table.metrics, line, strict=True)]
        lines.append([name.replace("|", r"\|"), *cells])
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    # Escaped, because a `*` could begin emphasis in Markdown.
    note = table.note.replace(f"{MARK}:", "\\" + f"{MARK}:")
    title = f"{table.title}:\n\n" if table.title else ""
    return f"{title}{body}\n\n{note}\n"


def latex(table: Comparison) -> str:
    """Format the table for the LaTeX package booktabs, with the note as its caption."""

    def cell(metric: Metric, value: Cell) -> str:
        shown = escape(text(metric, value))
        shown = rf"\textbf{{{shown}}}" if value.best else shown
        return shown + rf"$^{{{MARK}}}$" * value.differs

    heads = [wrap(metric.title, HEAD) for metric in table.metrics]
    depth = max(map(len, heads))
    # Headings of several lines end in the same line, directly above the rule.
    stacked = [
        " & ".join(
            ["", *(escape(([""] * (depth - len(head)) + head)[k]) for head in heads)]
        ).strip()
        for k in range(depth)
    ]
    lines = [
        " & ".join([escape(name), *(cell(m, c) for m, c in zip(table.metrics, row, strict=True))])
        for name, row in zip(table.names, table.cells, strict=True)
    ]
    above, body = ("\n".join(rf"    {line} \\" for line in part) for part in (stacked, lines))
    tight = "  \\footnotesize\n  \\setlength{\\tabcolsep}{3pt}\n" if len(heads) > ROOMY else ""
    caption = f"{table.title}. {table.note}" if table.title else table.note
    return (
        "% \\usepackage{booktabs}\n"
        "\\begin{table}\n"
        "  \\centering\n"
        f"  \\caption{{{escape(caption)}}}\n"
        f"{tight}"
        f"  \\begin{{tabular}}{{l{'r' * len(table.metrics)}}}\n"
        "    \\toprule\n"
        f"{above}\n"
        "    \\midrule\n"
        f"{body}\n"
        "    \\bottomrule\n"
        "  \\end{tabular}\n"
        "\\end{table}\n"
    )


def comma_separated(table: Comparison) -> str:
    """Format the table as CSV for programs: unrounded mean, std, number of seeds and p per metric.

    Shares are fractions here, not percent, and traffic is in bytes.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    ends = ("mean", "std", "n", "p")
    writer.writerow(["row", *(f"{m.name} {end}" for m in table.metrics for end in ends)])
    for name, line in zip(table.names, table.cells, strict=True):
        cells: list[str] = []
        for c in line:
            numbers = (c.mean, c.std, len(c.by_seed), c.p)
            # `repr` gives the shortest text that reads back as the same float.
            cells += ["" if n is None else repr(n) for n in numbers]
        writer.writerow([name, *cells])
    return out.getvalue()


def escape(words: str) -> str:
    """Escape text for LaTeX."""
    # One pass over the text: replacing in turn would escape the braces of earlier replacements.
    return re.sub("|".join(map(re.escape, _LATEX)), lambda found: _LATEX[found[0]], words)
