"""`fedprompt sweep` and `fedprompt compare`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedprompt.cli.completion import complete_protocol, complete_sweep
from fedprompt.cli.data import Overrides
from fedprompt.cli.options import Jobs, Quick, RayAddress, Serial
from fedprompt.runtime.endings import advice, command_line

if TYPE_CHECKING:
    from fedprompt.sweeps.plan import PlannedRun, SweepFile


def sweep(
    file: Annotated[
        str,
        typer.Argument(
            help="A shipped sweep (see 'fedprompt list') or a YAML file.",
            autocompletion=complete_sweep,
        ),
    ],
    overrides: Overrides = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds that replace those of the file, e.g. 1,2,3.")
    ] = None,
    quick: Quick = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the runs and the expected time, and run nothing."),
    ] = False,
    serial: Serial = False,
    jobs: Jobs = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs \\[runs/NAME].")] = None,
    ray_address: RayAddress = None,
) -> None:
    """Run every row, grid value and seed of a sweep; runs that are complete are kept.

    After an interruption, the same command continues. The exit status is 1 if runs failed.

    Examples:

      fedprompt sweep fedrsclip_ablation --dry-run

      fedprompt sweep my_table.yaml federation.rounds=20 --seeds 1,2,3
    """
    from dataclasses import replace

    from fedprompt.sweeps.plan import (
        MANY,
        count_runs,
        expand,
        load_sweep,
        read_seeds,
        sweep_path,
        write_plan,
    )

    table = load_sweep(sweep_path(file), quick=quick)
    if seeds is not None:
        table = replace(table, seeds=read_seeds(seeds))
    folder = out or Path("runs") / table.name
    changes = overrides or []
    if (runs := count_runs(table)) >= MANY:
        sys.stderr.write(f"composing the configs of {runs:,} runs ...\n")
    planned = expand(table, folder, changes)
    if dry_run:
        _print_plan(table, planned, jobs, serial=serial)
        return
    from fedprompt.files import refuse_foreign
    from fedprompt.reports.page import MARKS
    from fedprompt.reports.run_data import REPORT
    from fedprompt.sweeps.api import run_planned

    # Before hours of runs, not after them.
    refuse_foreign(folder / REPORT, *MARKS)
    write_plan(table, planned, folder, changes)
    with advice(lambda: f"continue with the same command: {command_line()}"):
        failures = run_planned(
            table, planned, folder, jobs=jobs, serial=serial, address=ray_address
        )
    _print_end(folder, planned, failures, table.protocol)
    if failures:
        raise typer.Exit(1)


def compare(
    paths: Annotated[
        list[Path],
        typer.Argument(help="Run folders, or folders of sweeps.", metavar="RUN_OR_SWEEP"),
    ],
    metrics: Annotated[
        str | None,
        typer.Option(help="Columns: names, or paths into summary.json; see below."),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="terminal, markdown, csv or latex.")
    ] = "terminal",
    test: Annotated[
        str, typer.Option(help="Significance test, paired over seeds: t, wilcoxon or none.")
    ] = "t",
    where: Annotated[
        list[str] | None,
        typer.Option(help="Use only runs with this setting, KEY=VALUE; may be repeated."),
    ] = None,
    pivot: Annotated[
        str | None,
        typer.Option(help="Print only tables of methods by conditions, of these metrics."),
    ] = None,
    heat: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Draw a heat map over two settings, e.g. partition.alpha method.name."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write tables (md, csv, tex) and figures to.")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="Print the comparison of this protocol: few_shot, leave_one_domain_out, ...",
            autocompletion=complete_protocol,
        ),
    ] = None,
) -> None:
    """Compare runs: mean and standard deviation over seeds, the best value, significance.

    Rows are compared only under the same conditions: data set, partition, backbone and the values
    of a sweep's grid. Runs under several conditions also give tables of methods by conditions.

    Columns (--metrics a,b): global, personal, worst, p10, personal_on_global, attack_success, base,
    new, harmonic, numbers_up, bytes; or a path such as protocols.calibration.rows.global.ece:min,
    where :min means that smaller values are better.

    Examples:

      fedprompt compare runs/fedrsclip_ablation --format latex

      fedprompt compare runs/alpha runs/participation --out figures

      fedprompt compare runs/participation --pivot personal --format latex

      fedprompt compare runs/alpha_clients --heat partition.alpha partition.clients --out figures
    """
    from fedprompt.cli.compare import compare_command

    compare_command(
        paths,
        metrics=metrics,
        form=form,
        test=test,
        where=where or [],
        pivot=pivot,
        heat=heat,
        out=out,
        protocol=protocol,
    )


def _print_plan(
    table: SweepFile, planned: Sequence[PlannedRun], jobs: int | None, *, serial: bool
) -> None:
    from fedprompt.reports.format import human_time
    from fedprompt.runtime import cards
    from fedprompt.sweeps.gpus import with_gpus
    from fedprompt.sweeps.run import places_here
    from fedprompt.sweeps.state import progress, seconds_left

    console = Console(highlight=False)
    finished = begun = 0
    states = {run.name: progress(run) for run in planned}
    for run in planned:
        state = states[run.name]
        finished += state.done
        begun += state.begun and not state.done
        what = "done" if state.done else f"{state.rounds} rounds" if state.begun else "new"
        console.print(f"{what:>10}  {run.name}", markup=False, soft_wrap=True)
    left = len(planned) - finished
    resources = with_gpus(table.resources, planned, cards.count())
    at_once = 1 if serial else places_here(resources, left, jobs)
    seconds = seconds_left(planned, at_once, lambda run: states[run.name])
    expected = "unknown, since no run of this sweep is finished yet"
    if seconds is not None:
        expected = f"about {human_time(seconds)}, from {finished} finished runs"
    console.print(
        f"{len(planned)} runs: {finished} done, {begun} to continue, {left - begun} new; "
        f"{at_once} at the same time on this machine. Time: {expected}.",
        markup=False,
        soft_wrap=True,
    )


def _print_end(
    folder: Path, planned: Sequence[PlannedRun], failures: dict[str, str], protocol: str | None
) -> None:
    """Print the tables of complete runs, the path of the report, and the runs that failed."""
    from fedprompt.cli.compare import print_sweep
    from fedprompt.reports.sweep_report import write_sweep_report

    console = Console(highlight=False)
    # With no complete run there is nothing to put into a table.
    if len(failures) < len(planned):
        print_sweep(folder, console, protocol)
        page = write_sweep_report([folder], folder / "report.html", failed=[*failures.items()])
        console.print(f"report: {page}", markup=False, soft_wrap=True)
    for name, reason in failures.items():
        console.print(f"FAILED {name}: {reason}", markup=False, soft_wrap=True)
    console.print(
        f"{len(planned) - len(failures)} of {len(planned)} runs are complete; folder: {folder}",
        markup=False,
        soft_wrap=True,
    )
