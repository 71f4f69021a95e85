"""What stands under the table of a comparison: how to read it, and what its rows do not share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedprompt.reports.compare.cells import cell_keys, cells_of, method_names
from fedprompt.reports.compare.load import CHOSEN_BY, Row, differing, score_of
from fedprompt.reports.compare.names import plain
from fedprompt.reports.compare.statistics import LEVEL, Cell, Test
from fedprompt.reports.marks import mark_line
from fedprompt.reports.run_data import context_tokens
from fedprompt.reports.score_names import capital

TESTS = {"t": "paired t-test", "wilcoxon": "Wilcoxon signed-rank test"}
MARK = "*"
FEWEST_FOR_WILCOXON = 6
"""With fewer seeds than this, the smallest possible p, 2^(1 - n), is above 0.05."""
BUDGET = (
    "training",
    "federation",
    "conditions",
    "clock",
    "asynchronous",
    "privacy",
    "secure_aggregation",
    "attack",
)
"""Sections whose settings give a row an advantage or a handicap; they are named if they differ."""
NAMED = 4
"""A value that more methods have than this is given with their number."""


def reading_note(
    rows: Sequence[Row], cells: Sequence[Sequence[Cell]], test: Test, *, pivoted: bool = False
) -> str:
    """Say what the numbers are, what is marked, how it was tested, and what made the numbers.

    Args:
        rows: The rows of the comparison.
        cells: The cells of its rows.
        test: The test of every row against the best one of its cell.
        pivoted: Whether the columns are the cells of the rows. Such a table stands below that of
            the rows, which says in what they are not matched.
    """
    keys = [] if pivoted else cell_keys(rows)
    sentences = [_numbers(rows)]
    if any(cell.best for line in cells for cell in line):
        where = f" among rows with the same {_all(keys)}" if keys else " of the column"
        sentences.append(f"Bold: best mean{where}.")
    tested = [cell for line in cells for cell in line if cell.p is not None]
    if tested:
        within = " and group" if keys else ""
        how = (
            f"p < {LEVEL:g} in a {TESTS[test]} over common seeds, "
            f"Holm-corrected in each column{within}."
        )
        marked = any(cell.differs for cell in tested)
        sentences.append(
            f"{MARK}: differs from the best, {how}" if marked else f"No row differs with {how}"
        )
    most = max(len(row.runs) for row in rows)
    if test == "wilcoxon" and 1 < most < FEWEST_FOR_WILCOXON:
        sentences.append(f"With {most} seeds this test cannot reach p < {LEVEL:g}.")
    if keys and any(len(cell) == 1 for cell in cells_of(rows)):
        sentences.append(f"A row that shares its {_all(keys)} with no other row is not compared.")
    if not pivoted:
        unlike = unlike_settings(rows)
        sentences += [f"Rows are not matched in {'; '.join(unlike)}."] if unlike else []
        sentences += [selection_note(rows), marked_note(rows), _made_with(rows)]
    return " ".join(filter(None, sentences))


def _numbers(rows: Sequence[Row]) -> str:
    seeds = {tuple(sorted(row.runs)) for row in rows}
    counts = sorted({len(s) for s in seeds})
    score = capital(score_of(rows))
    if counts[-1] == 1:
        which = f": {min(seeds)[0]}" if len(seeds) == 1 else ""
        return f"{score} in percent, one seed{which}."
    if len(seeds) == 1:
        over = f"seeds {', '.join(map(str, min(seeds)))}"
    else:
        over = f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else f"{counts[0]} seeds"
    return f"{score} in percent; mean ± sample standard deviation (n - 1) over {over}."


def unlike_settings(rows: Sequence[Row]) -> list[str]:
    """Return the settings in which rows that are compared with each other are not matched.

    These are the number of context tokens, and everything about training, sampling and protection
    that is no condition of a cell.

    Args:
        rows: The rows of the comparison.

    Returns:
        A text per setting: `training.lr: 0.0005 (FedCLIP), 0.02 (37 methods)`.
    """
    conditions = cell_keys(rows)
    keys = [k for k in differing(rows) if k.partition(".")[0] in BUDGET and k not in conditions]
    values = {key: [row.settings.get(key) for row in rows] for key in keys}
    tokens = [context_tokens(method_section(row)) for row in rows]
    found = {"context tokens": tokens, **values}
    return [text for key, column in found.items() if (text := _unlike(rows, key, column))]


def method_section(row: Row) -> dict[str, Any]:
    """Return the `method` section of a row's settings, with the options of a wrapped method."""
    start = "method."
    return {
        k.removeprefix(start).removeprefix("options."): v
        for k, v in row.settings.items()
        if k.startswith(start) and not k.endswith("options")
    }


def _unlike(rows: Sequence[Row], key: str, column: Sequence[Any]) -> str:
    """Format one setting's values with their rows; empty if all rows that have it agree."""
    names: dict[Any, list[str]] = {}
    for name, value in zip(method_names(rows), column, strict=True):
        # A method that is measured under several conditions is named once.
        text = plain(value)
        if value is not None and name not in names.setdefault((text, _short(value, text)), []):
            names[text, _short(value, text)].append(name)
    if len(names) < 2:
        return ""
    parts = [f"{short} ({_who(who)})" for (_, short), who in names.items()]
    return f"{key}: {', '.join(parts)}"


def _short(value: Any, text: str) -> str:
    """A searched learning rate has 17 digits, of which a reader needs four."""
    return f"{value:.4g}" if isinstance(value, float) else text


def selection_note(rows: Sequence[Row]) -> str:
    """Say which search chose the rows' settings, and which round is reported; often nothing."""
    names = method_names(rows)
    searches: dict[str, list[str]] = {}
    for row, name in zip(rows, names, strict=True):
        # Empty for settings that nobody searched, and missing in runs of older versions.
        search = str(row.settings.get(CHOSEN_BY) or "")
        if name not in searches.setdefault(search, []):
            searches[search].append(name)
    sentences = []
    if set(searches) != {""}:
        texts = [f"{search or 'not searched'} ({_who(who)})" for search, who in searches.items()]
        sentences.append(f"Settings: {'; '.join(texts)}.")
    key = "evaluation.select"
    rules = [row.settings.get(key) or "last" for row in rows]
    if set(rules) == {"best_validation"}:
        sentences.append("Reported round: the best on validation images.")
    elif len(set(rules)) > 1:
        sentences.append(f"Rows are not matched in {_unlike(rows, key, rules)}.")
    return " ".join(sentences)


def marked_note(rows: Sequence[Row]) -> str:
    """Name the runs whose result is marked, each with its row, its seed and the reason."""
    texts = [
        f"{row.name}, seed {seed}: {line}"
        for row in rows
        for seed, run in sorted(row.runs.items())
        if (line := mark_line(run.summary or {}))
    ]
    return f"Marked: {'. '.join(texts)}." if texts else ""


def _who(names: Sequence[str]) -> str:
    return "; ".join(names) if len(names) <= NAMED else f"{len(names)} methods"


def _made_with(rows: Sequence[Row]) -> str:
    """The versions behind the numbers, each value once; nothing for runs that name none."""
    names = ("fedprompt", "torch", "open_clip", "flwr")
    environments: list[Mapping[str, Any]] = [
        (run.summary or {}).get("environment") or {} for row in rows for run in row.runs.values()
    ]
    parts = []
    for name in names:
        # A dictionary without values is a set that keeps its order.
        values = dict.fromkeys(str(e[name]) for e in environments if e.get(name))
        parts += [f"{name} {' and '.join(values)}"] if values else []
    return f"Made with {', '.join(parts)}." if parts else ""


def _all(keys: Sequence[str]) -> str:
    """Join words as in a sentence: `a`, `a and b`, `a, b and c`."""
    *first, last = keys
    return f"{', '.join(first)} and {last}" if first else last
