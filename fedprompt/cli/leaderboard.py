"""`fedprompt leaderboard`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedprompt.leaderboard.collect import Suite

OUT = Path("runs") / "leaderboard"


def leaderboard(
    paths: Annotated[
        list[Path],
        typer.Argument(help="Result files, folders of suites, or folders with such files in them."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the page, tables and figures.")] = OUT,
    settings: Annotated[
        str, typer.Option(help="tuned, default or both: which settings are ranked.")
    ] = "both",
    metric: Annotated[
        str,
        typer.Option(help="value (the metric of each scenario), last, global, personal or worst."),
    ] = "value",
    blocks: Annotated[
        str, typer.Option(help="What rows are ranked in: scenarios, or single runs (one per seed).")
    ] = "scenarios",
    by: Annotated[
        str, typer.Option(help="Order of the rows: score, rank, or the name of a scenario.")
    ] = "score",
) -> None:
    """Merge the result files of suites, from anyone, into tables with ranks and significance.

    Files that cannot be compared with the others are refused, each with its reason; the rest is
    ranked, and the exit status is 1.

    Examples:

      fedprompt leaderboard runs/scenes-v1

      fedprompt leaderboard runs/scenes-v1 from_others/*.json --out board
    """
    import sys
    from typing import get_args

    from fedprompt.errors import RunFailed, UserError
    from fedprompt.leaderboard.board import Blocks, Metric, make_board
    from fedprompt.leaderboard.collect import collect
    from fedprompt.leaderboard.output import Section, markdown, write
    from fedprompt.suites.result_file import SETTINGS

    for option, value, known in (
        ("--settings", settings, (*SETTINGS, "both")),
        ("--metric", metric, get_args(Metric)),
        ("--blocks", blocks, get_args(Blocks)),
    ):
        if value not in known:
            raise UserError(f"leaderboard: {option} is {value!r}; it must be {', '.join(known)}.")
    suites, refused = collect(paths)
    _check_order(by, suites)
    sections = []
    for suite in suites:
        boards = [
            make_board(suite, setting, metric=metric, kind=blocks, by=by)  # type: ignore[arg-type]
            for setting in SETTINGS
            if settings in (setting, "both")
        ]
        sections.append(Section(suite, tuple(board for board in boards if board)))
    if sections:
        sys.stdout.write(markdown(sections, ()))
        # On stderr, so that tables which are piped into a file contain nothing else.
        for path in write(sections, refused, out):
            sys.stderr.write(f"wrote {path}\n")
    for one in refused:
        sys.stderr.write(f"refused: {one.reason}\n")
    if not sections:
        raise RunFailed("leaderboard: all files were refused.")
    if refused:
        raise typer.Exit(1)


def _check_order(by: str, suites: Sequence[Suite]) -> None:
    from fedprompt.errors import UserError, did_you_mean
    from fedprompt.leaderboard.board import RANK, SCORE

    known = dict.fromkeys([SCORE, RANK, *(name for suite in suites for name in suite.planned)])
    # Without a suite, there is nothing to order.
    if suites and by not in known:
        raise UserError(f"leaderboard: --by {by!r} is unknown.{did_you_mean(by, list(known))}")
