"""`fedprompt tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedprompt.cli.data import Overrides
from fedprompt.cli.options import RayAddress
from fedprompt.runtime.endings import advice, command_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedprompt.tuning.search import RowResult


def tune(
    name: Annotated[
        str, typer.Argument(help="An experiment, or a sweep whose rows are tuned; or a YAML file.")
    ],
    overrides: Overrides = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods to tune on an experiment, e.g. promptfl,fedrsclip.")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Trials of every row \\[12].")] = None,
    budget_steps: Annotated[
        int | None, typer.Option(min=1, help="Client steps of every row, in place of --trials.")
    ] = None,
    budget_seconds: Annotated[
        float | None, typer.Option(min=1, help="Seconds of every row, in place of --trials.")
    ] = None,
    sampler: Annotated[str, typer.Option(help="tpe, random or grid.")] = "tpe",
    prune: Annotated[str, typer.Option(help="median, hyperband or none.")] = "median",
    objective: Annotated[
        str, typer.Option(help="Accuracy on validation images to maximise: personal or global.")
    ] = "personal",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the proposals.")] = 1,
    seeds: Annotated[str | None, typer.Option(help="Seeds of the tuned sweep, e.g. 1,2,3.")] = None,
    space: Annotated[
        Path | None, typer.Option(help="YAML file with spaces that replace those of the methods.")
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Trials of a row that are proposed together.")
    ] = 4,
    serial: Annotated[
        bool, typer.Option("--serial", help="Do one trial after the other, in this process.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Most trials at once \\[as the machine has room for].")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder \\[runs/tune-NAME].")] = None,
    ray_address: RayAddress = None,
) -> None:
    """Search settings on validation images, with the same budget for every method.

    No trial opens a test image. After an interruption, the same command continues and ends with
    the same settings. The folder then holds a sweep of the tuned methods.

    Examples:

      fedprompt tune label_skew --methods coop_local,promptfl,fedrsclip

      fedprompt sweep runs/tune-label_skew/tuned.yaml
    """
    from typing import get_args

    from fedprompt.errors import UserError
    from fedprompt.sweeps.plan import read_seeds
    from fedprompt.tuning.plan import Budget, Pruner, Sampler, make_plan
    from fedprompt.tuning.results import TUNED, write_results
    from fedprompt.tuning.search import search

    for option, value, known in (
        ("--sampler", sampler, get_args(Sampler)),
        ("--prune", prune, get_args(Pruner)),
        ("--objective", objective, ("personal", "global")),
    ):
        if value not in known:
            raise UserError(f"tune: {option} is {value!r}; it must be {', '.join(known)}.")
    if sum(x is not None for x in (trials, budget_steps, budget_seconds)) > 1:
        raise UserError(
            "tune: give only one of --trials, --budget-steps and --budget-seconds; a search has "
            "one kind of budget."
        )
    budget = Budget(
        trials=trials or Budget.trials,
        batch=batch,
        sampler=sampler,  # type: ignore[arg-type]
        pruner=prune,  # type: ignore[arg-type]
        seed=seed,
        objective=objective,  # type: ignore[arg-type]
        steps=budget_steps,
        seconds=budget_seconds,
    )
    plan = make_plan(
        name,
        overrides or [],
        budget,
        methods=[m.strip() for m in methods.split(",")] if methods else (),
        spaces=space,
        seeds=() if seeds is None else read_seeds(seeds),
    )
    folder = out or Path("runs") / f"tune-{plan.name}"
    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    with advice(lambda: f"continue with the same command: {command_line()}"):
        results = search(plan, folder, jobs=jobs, serial=serial, address=ray_address, say=say)
    write_results(plan, results, folder)
    _print_results(results, console)
    say(f"next: fedprompt sweep {folder / TUNED}")
    if any(result.row.space and result.best is None for result in results):
        raise typer.Exit(1)


def _print_results(results: Sequence[RowResult], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from fedprompt.reports.format import MISSING, percent
    from fedprompt.reports.terminal import LOOK
    from fedprompt.tuning.results import result_rows

    table = Table(title=Text("best on validation images"), title_justify="left", **LOOK)
    for column in ("row", "own", "tuned", "trials", "client steps", "settings"):
        numbers = column not in ("row", "settings")
        table.add_column(column, justify="right" if numbers else "left")
    for row in result_rows(results):
        # The last part of a key says enough beside the row's name.
        values = [f"{k.rpartition('.')[2]} {_short(v)}" for k, v in row["values"].items()]
        remarks = [f"{row[k]} {k}" for k in ("pruned", "failed") if row[k]]
        trials = f"{row['trials']} ({', '.join(remarks)})" if remarks else str(row["trials"])
        table.add_row(
            Text(row["row"]),
            percent(row["own"]),
            percent(row["tuned"]),
            trials,
            f"{row['steps']:,}",
            Text(", ".join(values) or MISSING),
        )
    console.print(table)
    for result in results:
        for number, reason in result.failures.items():
            console.print(
                f"FAILED {result.row.name}, trial {number}: {reason}", markup=False, soft_wrap=True
            )


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
