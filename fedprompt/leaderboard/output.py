"""Writes a leaderboard: Markdown, one HTML page, figures, and all numbers for programs.

`leaderboard.csv` has one line per run, as in the result files; `leaderboard.json` has everything
that was computed from them, unrounded.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprompt.errors import UserError
from fedprompt.files import refuse_foreign, write_bytes
from fedprompt.leaderboard.board import Board
from fedprompt.leaderboard.collect import Entry, Refused, Suite
from fedprompt.leaderboard.figures import board_figures, pareto_front
from fedprompt.leaderboard.notes import divergences
from fedprompt.leaderboard.tables import board_tables, escaped
from fedprompt.reports.compare.statistics import Cell
from fedprompt.reports.draw import MARK as PNG_MARK
from fedprompt.reports.draw import save_all
from fedprompt.reports.format import plural
from fedprompt.reports.page import MARKS as HTML_MARKS
from fedprompt.reports.page import render
from fedprompt.suites.checked_json import plain
from fedprompt.suites.result_file import SETTINGS

NAME = "leaderboard"
TEMPLATE = "leaderboard.html.j2"
MARKS = {".md": (b"# Leaderboard",), ".csv": (b"suite,suite_hash,",), ".json": (b'"leaderboard"',),
         ".html": HTML_MARKS}  # fmt: skip
"""What our files contain near their beginning, by suffix."""


@dataclass(frozen=True)
class Section:
    """One suite of a leaderboard, with its boards by setting; there may be none."""

    suite: Suite
    boards: tuple[Board, ...]


def markdown(sections: Sequence[Section], refused: Sequence[Refused]) -> str:
    """The leaderboard in Markdown: a section per suite, then the files that were refused."""
    parts = ["# Leaderboard\n"]
    for section in sections:
        parts.append(f"## {section.suite.name}\n\n{escaped('; '.join(_facts(section.suite)))}.\n")
        if any(board.lines for board in section.boards):
            parts += [table.markdown() for table in board_tables(section.boards)]
        parts += [_listed("Not ranked", _incomplete(section)), _listed("Notes", _notes(section))]
    parts.append(_listed("Refused", [one.reason for one in refused], level=2))
    return "\n".join(filter(None, parts))


def write(sections: Sequence[Section], refused: Sequence[Refused], out: Path) -> list[Path]:
    """Write all files of a leaderboard.

    Args:
        sections: The suites, at least one.
        refused: The files that were refused.
        out: The folder, which is created if necessary.

    Returns:
        The paths of the files, the page first.

    Raises:
        UserError: The folder cannot be written, or contains files of these names that are not ours.
    """
    figures = {section.suite.name: board_figures(section.boards) for section in sections}
    drawn = [figure for of_suite in figures.values() for figure in of_suite]
    contents = {
        ".html": html(sections, refused),
        ".md": markdown(sections, refused),
        ".csv": _csv(sections),
        ".json": _json(sections, refused),
    }
    # All are checked before the first is written.
    for suffix, marks in MARKS.items():
        refuse_foreign(out / f"{NAME}{suffix}", *marks)
    for figure in drawn:
        refuse_foreign(out / f"{figure.name}.png", PNG_MARK)
    written = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for suffix, text in contents.items():
            path = out / f"{NAME}{suffix}"
            write_bytes(path, text.encode("utf-8", "backslashreplace"))
            written.append(path)
        written += save_all(drawn, out)
    except OSError as error:
        raise UserError(f"leaderboard: cannot write to {out}: {error.strerror}.") from None
    return written


def html(sections: Sequence[Section], refused: Sequence[Refused]) -> str:
    """The leaderboard as one HTML page, which needs no other file and no network."""
    shown = [
        {
            "name": section.suite.name,
            "facts": _facts(section.suite),
            "tables": board_tables(section.boards) if any(b.lines for b in section.boards) else [],
            "figures": board_figures(section.boards),
            "incomplete": _incomplete(section),
            "notes": _notes(section),
            "files": [_file_facts(entry) for entry in section.suite.entries],
        }
        for section in sections
    ]
    rows = sum(len(section.suite.entries) for section in sections)
    facts = [plural(len(sections), "suite"), plural(rows, "row")]
    facts += [f"{plural(len(refused), 'file')} refused"] if refused else []
    figures = [figure for section in sections for figure in board_figures(section.boards)]
    content = {"title": "Leaderboard", "facts": facts, "sections": shown, "refused": refused}
    return render(TEMPLATE, figures, content)


def _facts(suite: Suite) -> list[str]:
    metrics = dict.fromkeys(suite.metrics.values())
    seeds = dict.fromkeys(", ".join(map(str, planned)) for planned in suite.planned.values())
    return [
        plural(len(suite.entries), "row"),
        f"scenarios {', '.join(suite.planned)}",
        f"seeds {' / '.join(seeds)}",
        f"metric {', '.join(metrics)}",
        f"content {suite.digest[:12]}",
    ]


def _incomplete(section: Section) -> list[str]:
    return [
        "; ".join([f"{one.row}, {board.setting} settings: incomplete, without {one.missing}",
                   *divergences(one)])
        for board in section.boards
        for one in board.incomplete
    ]  # fmt: skip


def _notes(section: Section) -> list[str]:
    notes = []
    for entry in section.suite.entries:
        if entry.copies:
            copies = ", ".join(map(str, entry.copies))
            notes.append(f"{entry.result.row}: {entry.path} is used; {copies} agrees with it")
    return notes


def _file_facts(entry: Entry) -> tuple[str, str, str, str]:
    """Row, file, versions and machine."""
    result = entry.result
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    machine = ", ".join(f"{name} {what}" for name, what in result.machine.items())
    return result.row, str(entry.path), versions, machine


def _listed(title: str, items: Sequence[str], level: int = 3) -> str:
    lines = "\n".join(f"- {escaped(item)}" for item in items)
    return f"{'#' * level} {title}\n\n{lines}\n" if items else ""


def _csv(sections: Sequence[Section]) -> str:
    """One line per run of every file that was not refused."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["suite", "suite_hash", "row", "method", "setting", "scenario", "metric", "seed"]
    first = True
    for section in sections:
        for entry in section.suite.entries:
            result = entry.result
            for name, scenario in result.scenarios.items():
                for setting in SETTINGS:
                    measured = getattr(scenario, setting)
                    for seed, run in measured.seeds.items() if measured else ():
                        numbers = plain(run)
                        if first:
                            writer.writerow([*head, *numbers, "file"])
                            first = False
                        writer.writerow(
                            [result.suite, result.suite_hash, result.row, result.method, setting,
                             name, scenario.metric, seed, *numbers.values(), entry.path]
                        )  # fmt: skip
    return out.getvalue()


def _json(sections: Sequence[Section], refused: Sequence[Refused]) -> str:
    content: dict[str, Any] = {
        "leaderboard": 1,
        "suites": {
            section.suite.name: {
                "suite_hash": section.suite.digest,
                "settings": {board.setting: _board(board) for board in section.boards},
            }
            for section in sections
        },
        "refused": {str(one.path): one.reason for one in refused},
    }
    return f"{json.dumps(content, indent=1, allow_nan=False)}\n"


def _board(board: Board) -> dict[str, Any]:
    front = {line.row for line in pareto_front(board.lines)}
    return {
        "metric": board.metric,
        "blocks": board.kind,
        "number_of_blocks": board.ranks.blocks,
        "friedman_chi_squared": board.ranks.statistic,
        "friedman_p": board.ranks.p,
        "critical_difference": board.ranks.critical_difference,
        "groups_without_difference": [
            [board.lines[i].row for i in group] for group in board.ranks.groups
        ],
        "rows": {
            line.row: {
                "score": _cell(line.score),
                "average_rank": line.rank,
                "pareto": line.row in front,
                "scenarios": {name: _cell(cell) for name, cell in line.cells.items()},
                "cost": plain(line.cost),
                "diverged": [list(item) for item in line.diverged],
                "file": str(line.entry.path),
            }
            for line in board.lines
        },
        "incomplete": {one.row: one.missing for one in board.incomplete},
    }


def _cell(cell: Cell) -> dict[str, float | None]:
    return {"mean": cell.mean, "std": cell.std, "p": cell.p}
