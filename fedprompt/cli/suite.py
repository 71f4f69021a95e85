"""`fedprompt suite`: benchmark suites."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedprompt.cli.completion import complete_suite
from fedprompt.cli.options import Jobs, Quick, RayAddress, Serial
from fedprompt.errors import UserError
from fedprompt.runtime.endings import advice, command_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedprompt.suites.run import SuiteResult
    from fedprompt.suites.spec import Suite

suite_app = typer.Typer(no_args_is_help=True, help="Run benchmark suites.")
SETTINGS = {"tuned": ("tuned",), "default": ("default",), "both": ("tuned", "default")}

Name = Annotated[
    str,
    typer.Argument(
        help="A shipped suite (see 'fedprompt suite list') or a YAML file.",
        autocompletion=complete_suite,
    ),
]


@suite_app.command()
def run(
    name: Name,
    methods: Annotated[
        str | None, typer.Option(help="Only these rows, e.g. promptfl,fedrsclip; or a new method.")
    ] = None,
    settings: Annotated[
        str, typer.Option(help="tuned, default (those of the papers) or both.")
    ] = "both",
    quick: Quick = False,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with a folder per data set, named as in the catalogue."),
    ] = None,
    serial: Serial = False,
    jobs: Jobs = None,
    out: Annotated[Path | None, typer.Option(help="Folder \\[runs/suites/NAME].")] = None,
    ray_address: RayAddress = None,
) -> None:
    """Tune and run the rows of a suite, and write a result file of each.

    What is complete is kept, so after an interruption the same command continues, and another one
    may add rows.

    Examples:

      fedprompt suite run scenes-v1 --quick

      fedprompt suite run scenes-v1 --methods promptfl,fedrsclip --settings tuned
    """
    from fedprompt.suites.load import load_suite, suite_path
    from fedprompt.suites.rows import select_rows
    from fedprompt.suites.run import Execution, run_suite

    if settings not in SETTINGS:
        raise UserError(f"suite: --settings is {settings!r}; it must be {', '.join(SETTINGS)}.")
    suite = load_suite(suite_path(name), quick=quick)
    wanted = [m.strip() for m in methods.split(",")] if methods else None
    rows = select_rows(suite, wanted)
    folder = out or Path("runs") / "suites" / suite.name
    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    with advice(lambda: f"continue with the same command: {command_line()}"):
        result = run_suite(
            suite,
            rows,
            folder,
            settings=SETTINGS[settings],
            data=data,
            execution=Execution(jobs, serial, ray_address),
            say=say,
        )
    _print_result(suite, result, folder, console)
    if result.failures:
        raise typer.Exit(1)


@suite_app.command("list")
def list_suites() -> None:
    """List the shipped suites."""
    from rich.table import Column, Table
    from rich.text import Text

    from fedprompt.config.shipped import shipped_names
    from fedprompt.reports.terminal import LOOK
    from fedprompt.suites.load import load_suite, suite_path

    table = Table("suite", "scenarios", "rows", "runs", Column("", overflow="fold"), **LOOK)
    for name in shipped_names("suite"):
        suite = load_suite(suite_path(name))
        counts = (len(suite.scenarios), len(suite.rows), count_runs(suite))
        table.add_row(name, *(f"{n:,}" for n in counts), Text(suite.title))
    Console(highlight=False).print(table)


@suite_app.command()
def show(name: Name) -> None:
    """Show what a suite fixes: scenarios, rows, seeds, search and fingerprints."""
    from rich.table import Table
    from rich.text import Text

    from fedprompt.reports.terminal import LOOK
    from fedprompt.suites.collect import search_words
    from fedprompt.suites.load import load_suite, suite_path

    suite = load_suite(suite_path(name))
    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    say(f"{suite.name}: {suite.title}")
    say(f"seeds: {', '.join(map(str, suite.seeds))}")
    say(f"search: {search_words(suite)}")
    say(f"rows: {'; '.join(suite.rows)}")
    table = Table("scenario", "experiment", "metric", "settings of", "data", **LOOK)
    for one in suite.scenarios.values():
        pin = f"{one.data[:12]}..." if one.data else "unpinned"
        table.add_row(*map(Text, (one.name, one.experiment, one.metric, one.settings_of, pin)))
    console.print(table)
    say(f"runs: {count_runs(suite):,} at most, trials included")
    say(f"suite hash: {suite.hash}")


def count_runs(suite: Suite) -> int:
    """Trials and runs of all rows with both settings."""
    searches = sum(not scenario.settings_of for scenario in suite.scenarios.values())
    reported = 2 * len(suite.scenarios) * len(suite.seeds)
    return len(suite.rows) * (searches * suite.budget.trials + reported)


def _print_result(suite: Suite, result: SuiteResult, folder: Path, console: Console) -> None:
    from fedprompt.suites.summary import accuracies, costs

    for setting in SETTINGS["both"]:
        cells = accuracies(suite, result.results, setting)
        if len(cells) > 1:
            _print_table(f"{setting} settings, percent, mean over seeds", cells, console)
    if result.results:
        _print_table("cost of the runs of one setting", costs(result.results), console)
    for name, reason in result.failures.items():
        console.print(f"FAILED {name}: {reason}", markup=False, soft_wrap=True)
    for line in (
        f"{len(result.results)} result files: {folder / 'results'}",
        f"next: fedprompt leaderboard {folder}",
    ):
        console.print(line, markup=False, soft_wrap=True)


def _print_table(title: str, cells: Sequence[Sequence[str]], console: Console) -> None:
    from rich.table import Column, Table
    from rich.text import Text

    from fedprompt.reports.terminal import LOOK

    columns = [Column(name, justify="right", overflow="fold") for name in cells[0][1:]]
    table = Table(
        Column(cells[0][0], overflow="fold"),
        *columns,
        title=Text(title),
        title_justify="left",
        **LOOK,
    )
    for row in cells[1:]:
        table.add_row(*map(Text, row))
    console.print(table)
