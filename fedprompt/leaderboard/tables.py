"""The tables of a leaderboard, for Markdown and for the page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fedprompt.leaderboard.board import Board, Line
from fedprompt.leaderboard.notes import (
    DIVERGED,
    accuracy_note,
    block_note,
    cost_note,
    divergence_note,
    scenario_names,
    search_note,
    significance_note,
    versions_note,
)
from fedprompt.reports.compare.notes import MARK
from fedprompt.reports.compare.statistics import Cell
from fedprompt.reports.format import MISSING, human_bytes, human_time

COSTS = ("bytes up", "bytes down", "client steps", "time", "peak memory")


@dataclass(frozen=True)
class Shown:
    """A cell as text, with the value by which a page sorts it."""

    text: str
    value: float | None = None
    best: bool = False


@dataclass(frozen=True)
class BoardTable:
    """A table whose first column is the name of the row.

    Attributes:
        title: Its title.
        columns: The headings of the other columns.
        rows: The rows in order, with a cell for each heading.
        notes: Paragraphs that stand below.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Shown, ...]], ...]
    notes: tuple[str, ...]

    def markdown(self) -> str:
        """The table in Markdown, with its title as a heading and its note below."""
        lines = [["", *self.columns], ["---"] * (len(self.columns) + 1)]
        for name, cells in self.rows:
            texts = [
                f"**{c.text}**" if c.best else c.text.replace(MARK, f"\\{MARK}") for c in cells
            ]
            lines.append([escaped(name), *texts])
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([f"### {self.title}", body, *map(escaped, self.notes)]) + "\n"


def escaped(text: str) -> str:
    """Text that others wrote, without what Markdown would take for a table, HTML or emphasis."""
    return re.sub(r"[\\|*`\[]|<(?=\S)", r"\\\g<0>", text)


def board_tables(boards: Sequence[Board]) -> list[BoardTable]:
    """The tables of one suite: scores, ranks and costs, then the accuracies at each setting.

    Args:
        boards: The boards of the suite by setting; costs are those of the first one, which also
            decides the order. At least one has a complete row.
    """
    ranked = [board for board in boards if board.lines]
    return [_overview(ranked), *map(_by_scenario, ranked)]


def _overview(boards: Sequence[Board]) -> BoardTable:
    lines: dict[str, dict[str, Line]] = {}
    for board in boards:
        for line in board.lines:
            lines.setdefault(line.row, {})[board.setting] = line
    columns: list[str] = []
    for board in boards:
        columns += [f"{board.setting} score", f"{board.setting} rank"]
    both = len(boards) > 1
    rows = []
    for name, of_row in lines.items():
        cells: list[Shown] = []
        for board in boards:
            here = of_row.get(board.setting)
            cells += (
                [_score(here), Shown(f"{here.rank:.2f}", here.rank)]
                if here
                else [Shown(MISSING), Shown(MISSING)]
            )
        cells += [_gain(of_row)] if both else []
        # A row without results at the first setting shows what it costs at the other one.
        rows.append((name, (*cells, *_costs(next(iter(of_row.values()))))))
    notes = [accuracy_note(boards[0]), block_note(boards[0])]
    notes += [significance_note(board) for board in boards]
    if any(line.diverged for board in boards for line in board.lines):
        notes.append(f"{DIVERGED}: some of its runs diverged, see below.")
    notes += [search_note(boards), cost_note(boards), versions_note(boards)]
    return BoardTable(
        "Scores, ranks and costs",
        (*columns, *(["gain by tuning"] if both else []), *COSTS),
        tuple(rows),
        tuple(filter(None, notes)),
    )


def _by_scenario(board: Board) -> BoardTable:
    scenarios = list(board.suite.planned)
    rows = []
    for line in board.lines:
        diverged = {scenario for scenario, _, _ in line.diverged}
        cells = tuple(
            _accuracy(
                line.cells[name], MARK * line.cells[name].differs + DIVERGED * (name in diverged)
            )
            for name in scenarios
        )
        rows.append((line.row, cells))
    tested = [cell for line in board.lines for cell in line.cells.values() if cell.p is not None]
    notes = [accuracy_note(board, scores=False)]
    if any(cell.differs for cell in tested):
        notes.append(
            f"{MARK}: differs from the best of its column, p < 0.05 in a paired t-test over seeds, "
            "Holm-corrected in each column. A row without a star may differ all the same, because "
            "the test has few seeds."
        )
    elif tested:
        notes.append("No row differs from the best of its column in a paired t-test over seeds.")
    notes.append(divergence_note(board))
    return BoardTable(
        f"Accuracy with {board.setting} settings",
        tuple(scenario_names(board)),
        tuple(rows),
        tuple(filter(None, notes)),
    )


def _accuracy(cell: Cell, marks: str = "") -> Shown:
    if cell.mean is None:
        return Shown(MISSING)
    spread = "" if cell.std is None else f" ± {100 * cell.std:.1f}"
    return Shown(f"{100 * cell.mean:.1f}{spread}{marks}", cell.mean, cell.best)


def _score(line: Line) -> Shown:
    return _accuracy(line.score, MARK * line.score.differs + DIVERGED * bool(line.diverged))


def _gain(lines: dict[str, Line]) -> Shown:
    if len(lines) < 2:
        return Shown(MISSING)
    gain = (lines["tuned"].score.mean or 0.0) - (lines["default"].score.mean or 0.0)
    return Shown(f"{100 * gain:+.1f}", gain)


def _costs(line: Line) -> list[Shown]:
    cost = line.cost
    peak = MISSING if cost.peak_memory is None else human_bytes(cost.peak_memory)
    return [
        Shown(human_bytes(round(cost.bytes_up)), cost.bytes_up),
        Shown(human_bytes(round(cost.bytes_down)), cost.bytes_down),
        Shown(f"{cost.client_steps:,.0f}", cost.client_steps),
        Shown(human_time(cost.seconds), cost.seconds),
        Shown(peak, cost.peak_memory),
    ]
