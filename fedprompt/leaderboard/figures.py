"""The figures of a leaderboard: critical-difference diagrams, and accuracy against traffic."""

from __future__ import annotations

from collections.abc import Sequence

from fedprompt.leaderboard.board import Board, Line
from fedprompt.leaderboard.ranks import LEVEL
from fedprompt.reports.figure import Axis, Curve, Figure, Level, Lines
from fedprompt.reports.figure_ranks import CriticalDifference

MOST_LEVELS = 4
"""Reference lines for rows that send nothing; the best ones have one."""


def board_figures(boards: Sequence[Board]) -> list[Figure]:
    """Describe the figures of one suite.

    Args:
        boards: The boards of the suite by setting. Traffic is drawn for the first one.
    """
    ranked = [board for board in boards if board.lines]
    figures = [figure for board in ranked if (figure := _ranks(board)) is not None]
    if ranked and (traffic := _traffic(ranked[0])) is not None:
        figures.append(traffic)
    return figures


def _ranks(board: Board) -> Figure | None:
    """The critical-difference diagram, None where there is no test."""
    ranks = board.ranks
    if ranks.critical_difference is None or ranks.p is None:
        return None
    order = sorted(range(len(board.lines)), key=lambda i: (ranks.averages[i], i))
    place = {row: position for position, row in enumerate(order)}
    panel = CriticalDifference(
        names=[board.lines[i].row for i in order],
        ranks=[ranks.averages[i] for i in order],
        difference=ranks.critical_difference,
        groups=[(place[group[0]], place[group[-1]]) for group in ranks.groups],
    )
    bars = "A bar joins rows that do not differ by Nemenyi's test."
    if not ranks.differ:
        bars = (
            f"One bar joins all rows, because Friedman's test finds no difference at {LEVEL:g} "
            f"(p = {ranks.p:.2g})."
        )
    return Figure(
        name=f"ranks-{board.suite.name}-{board.setting}",
        title=f"Average ranks with {board.setting} settings, {board.suite.name}",
        caption=f"Average rank over {ranks.blocks} {board.kind}; 1 is the best. {bars}",
        panels=[panel],
        wide=True,
    )


def pareto_front(lines: Sequence[Line]) -> list[Line]:
    """The rows that no other row matches in score with fewer bytes, or beats with as many.

    Args:
        lines: Rows of one board.

    Returns:
        The rows by ascending traffic.
    """
    front: list[Line] = []
    for line in sorted(lines, key=lambda line: (line.cost.traffic, -(line.score.mean or 0.0))):
        if not front or (line.score.mean or 0.0) > (front[-1].score.mean or 0.0):
            front.append(line)
    return front


def _traffic(board: Board) -> Figure | None:
    """Score against bytes; None if no row sends anything."""
    sending = [line for line in board.lines if line.cost.traffic > 0]
    silent = [line for line in board.lines if line.cost.traffic == 0]
    if not sending:
        return None
    front = pareto_front(board.lines)
    drawn = [line for line in front if line.cost.traffic > 0]
    silent.sort(key=lambda line: -(line.score.mean or 0.0))
    # The front comes last, so that its dots lie on those of its rows.
    curves = [_curve("rows", "c0", sending, named=False)]
    curves += [_curve("Pareto front", "c1", drawn, named=True)] if drawn else []
    panel = Lines(
        curves=curves,
        x=Axis(label="Bytes up and down, one run", format="bytes", log=True, noun="after"),
        y=Axis(label="Score", format="percent", low=0, high=1),
        levels=[
            Level(f"{line.row} (0 B)", "alone", line.score.mean or 0.0)
            for line in silent[:MOST_LEVELS]
        ],
        nearest=True,
    )
    names = "; ".join(line.row for line in front)
    return Figure(
        name=f"traffic-{board.suite.name}",
        title=f"Score against traffic with {board.setting} settings, {board.suite.name}",
        caption=(
            "On the Pareto front, where no other row has a higher score with as few bytes: "
            f"{names}."
        ),
        panels=[panel],
        wide=True,
    )


def _curve(name: str, color: str, lines: Sequence[Line], *, named: bool) -> Curve:
    ordered = sorted(lines, key=lambda line: line.cost.traffic)
    return Curve(
        name=name,
        color=color,
        x=[line.cost.traffic for line in ordered],
        y=[line.score.mean or 0.0 for line in ordered],
        notes=[line.row for line in ordered],
        noted=named,
        joined=False,
    )
