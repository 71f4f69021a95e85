"""The `fedprompt` command."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedprompt.runtime import set_defaults

set_defaults()

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Column, Table
from rich.text import Text

from fedprompt.cli.completion import complete_experiment
from fedprompt.cli.data import Overrides, data_app
from fedprompt.cli.deploy import deploy_app
from fedprompt.cli.sweep import compare, sweep
from fedprompt.errors import UserError
from fedprompt.reports.terminal import LOOK, fields, fitted

app = typer.Typer(
    help="Federated prompt learning for CLIP. Start with: fedprompt run quickstart",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.add_typer(deploy_app, name="deploy")
app.command()(sweep)
app.command()(compare)

RunDir = Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")]
Client = Annotated[
    int | None, typer.Option("--client", help="Use this client's personal model, not the global.")
]


@app.command()
def run(
    experiment: Annotated[
        str | None,
        typer.Argument(
            help="A shipped experiment (see 'fedprompt list') or a YAML file.",
            autocompletion=complete_experiment,
        ),
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Go on with an interrupted run folder.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")] = False,
) -> None:
    """Run an experiment and write its run folder.

    Examples:

      fedprompt run quickstart

      fedprompt run quickstart method=promptfl federation.rounds=30 seed=2

      fedprompt run --resume runs/quickstart-fedrsclip-seed1
    """
    from fedprompt.experiment import run as experiments
    from fedprompt.experiment.compose import compose
    from fedprompt.experiment.display import make_display

    if (experiment is None) == (resume is None):
        raise UserError("give an experiment, e.g. 'fedprompt run quickstart', or --resume RUN.")
    display = make_display(quiet)
    try:
        if resume is not None:
            experiments.resume(resume, display)
        else:
            assert experiment is not None
            experiments.run(compose(experiment, overrides or []), display)
    finally:
        display.close()


@app.command()
def report(
    paths: Annotated[
        list[Path],
        typer.Argument(help="A run folder, or several, or a sweep's.", metavar="RUN_OR_SWEEP..."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="File for several runs [SWEEP/report.html].")
    ] = None,
) -> None:
    """Draw the plots and report.html of a run again, also of an unfinished one; or of a sweep.

    Several runs, or a sweep's folder, give one report with means over seeds.
    """
    from fedprompt.experiment.summary import draw_report
    from fedprompt.reports.run_data import METRICS
    from fedprompt.reports.sweep_report import write_sweep_report

    alone = len(paths) == 1
    if alone and out is None and ((paths[0] / METRICS).is_file() or not paths[0].is_dir()):
        path = draw_report(paths[0])
    else:
        path = write_sweep_report(paths, out or (paths[0] if alone else Path()) / "report.html")
    _console().print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def predict(
    run_dir: RunDir,
    images: Annotated[list[Path], typer.Argument(help="Image files to classify.")],
    client: Client = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Classes to show per image.")] = 3,
) -> None:
    """Classify images with the prompts that a run has learned."""
    from fedprompt.experiment.predict import Classifier

    rows = []
    for prediction in Classifier(run_dir, client).predict(images, top):
        for i, (name, p) in enumerate(
            zip(prediction.classes, prediction.probabilities, strict=True)
        ):
            rows.append((str(prediction.image) if i == 0 else "", name, f"{100 * p:.1f} %"))
    heads = ("image", "class", "probability")
    first, *others = fields(heads, rows, left=heads[:2], most={"class": 30})
    console = _console()
    console.print(fitted(first, others, console.width))


@app.command()
def export(
    run_dir: RunDir,
    client: Client = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write [RUN/class_embeddings.safetensors].")
    ] = None,
) -> None:
    """Write class embeddings that work with plain open_clip."""
    from fedprompt.experiment.predict import Classifier

    path = out or run_dir / "class_embeddings.safetensors"
    Classifier(run_dir, client).export(path)
    _console().print(f"wrote {path}", markup=False, highlight=False)


@app.command()
def methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown page.")] = False,
) -> None:
    """List the methods: what they share, what they keep, what a client uploads per round."""
    from fedprompt.cli.method_table import method_table, methods_markdown

    if markdown:
        sys.stdout.write(methods_markdown())
    else:
        console = _console()
        console.print(method_table(console.width))


@app.command("list")
def list_configs() -> None:
    """List what is shipped, by group."""
    from fedprompt.data.sections import available
    from fedprompt.evaluation.registry import all_protocols

    table = Table("", Column("", overflow="fold"), show_header=False, **LOOK)
    for group in ("experiment", "sweep", "method", "strategy", "data", "backbone"):
        table.add_row(group, ", ".join(available(group)))
    table.add_row("protocol", ", ".join(all_protocols()))
    _console().print(table)


@app.command()
def doctor(
    cache: Annotated[
        str | None, typer.Option("--cache", help="As output.cache in a config.")
    ] = None,
) -> None:
    """Say what this machine has for a run, and what is wrong. Exit status 1: something is."""
    from fedprompt.cli.doctor import examine

    found = examine(cache)
    columns = [Column("", overflow="fold") for _ in range(3)]
    table = Table(*columns, box=None, show_header=False, padding=(0, 2, 0, 0))
    groups: set[str] = set()
    for one in found:
        if one.value:
            shown = "" if one.group in groups else one.group
            table.add_row(shown, one.name, Text(one.value, overflow="fold"))
            groups.add(one.group)
    _console().print(table, markup=False, highlight=False)
    problems = [one.problem for one in found if one.problem]
    for problem in problems:
        _console().print(f"PROBLEM {problem}", markup=False, highlight=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)
    _console().print("no problem found")


def main() -> None:
    """Entry point: user errors are one line and exit status 2."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_time=False, show_path=False)],
    )
    try:
        app(standalone_mode=True)
    except UserError as error:
        sys.stderr.write(f"fedprompt: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("fedprompt: stopped; 'fedprompt run --resume RUN' goes on.\n")
        sys.exit(130)


def _console() -> Console:
    return Console()
