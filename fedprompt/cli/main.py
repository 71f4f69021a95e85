"""The `fedprompt` command: its top-level subcommands, and how errors become exit statuses.

Subcommands import what they use inside their functions, so that `--help` and completion do not wait
for PyTorch and Flower.
"""

from __future__ import annotations

import errno
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedprompt.runtime import many_imports, set_defaults

# Before anything below imports a library that reads environment variables when it is imported.
set_defaults()

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Column, Table
from rich.text import Text

from fedprompt import __version__
from fedprompt.cli.completion import CompletionGroup, complete_experiment
from fedprompt.cli.data import Overrides, data_app
from fedprompt.cli.deploy import deploy_app
from fedprompt.cli.leaderboard import leaderboard
from fedprompt.cli.options import PredictionFile
from fedprompt.cli.output import use_lasting_output
from fedprompt.cli.suite import suite_app
from fedprompt.cli.sweep import compare, sweep
from fedprompt.cli.tune import tune
from fedprompt.errors import RunFailed, UserError, did_you_mean
from fedprompt.reports.terminal import LOOK
from fedprompt.runtime.endings import run_command
from fedprompt.runtime.peer_text import JsonLines, wants_json

REFUSED_BY_SYSTEM = (
    errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC,
)  # fmt: skip
"""Reasons for which the operating system refuses a path that a user has named."""
LONGEST_NAME = 120
"""Letters of such a path in a message."""

app = typer.Typer(
    cls=CompletionGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.add_typer(deploy_app, name="deploy")
app.add_typer(suite_app, name="suite")
app.command()(sweep)
app.command()(tune)
app.command()(compare)
app.command()(leaderboard)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"fedprompt {__version__}")
        raise typer.Exit


@app.callback()
def fedprompt(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Federated prompt learning for CLIP. Start with: fedprompt run quickstart."""
    del version


RunDir = Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")]
Client = Annotated[
    int | None,
    typer.Option(
        "--client", help="Use the personalised model of this client instead of the global model."
    ),
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
        Path | None, typer.Option("--resume", help="Continue the interrupted run in this folder.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")] = False,
) -> None:
    """Run an experiment and write its run folder.

    Examples:

      fedprompt run quickstart

      fedprompt run quickstart method=promptfl federation.rounds=30 seed=2

      fedprompt run --resume runs/quickstart-fedrsclip-seed1

      fedprompt run --resume runs/quickstart-fedrsclip-seed1 federation.rounds=60
    """
    from fedprompt.experiment.display import make_display

    # Beside --resume there is no experiment, so the first word is an override like the others.
    changes = [*([experiment] if experiment and resume else []), *(overrides or [])]
    if (experiment is None and resume is None) or (resume and any("=" not in x for x in changes)):
        raise UserError("give an experiment, e.g. 'fedprompt run quickstart', or --resume RUN.")
    display = make_display(quiet)
    try:
        # The imports below take several seconds, during which the user should see that something
        # happens.
        display.phase("loading PyTorch and Flower")
        with many_imports():
            from fedprompt.experiment import run as experiments
            from fedprompt.experiment.compose import compose

        if resume is not None:
            experiments.resume(resume, display, overrides=changes)
        else:
            assert experiment is not None
            experiments.run(compose(experiment, changes), display)
    finally:
        display.close()


@app.command()
def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="One or more run folders, or the folder of a sweep.", metavar="RUN_OR_SWEEP..."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="File for the report of several runs (default: SWEEP/report.html)."
        ),
    ] = None,
) -> None:
    """Draw the plots and report.html of a run or a sweep again; a run may be unfinished.

    Several runs, or the folder of a sweep, give one report with means over seeds.
    """
    from fedprompt.experiment.summary import draw_report
    from fedprompt.reports.run_data import METRICS
    from fedprompt.reports.sweep_report import write_sweep_report

    single = len(paths) == 1
    # A path that is no folder also goes to `draw_report`, whose error names what a run folder is.
    if single and out is None and ((paths[0] / METRICS).is_file() or not paths[0].is_dir()):
        path = draw_report(paths[0])
    else:
        path = write_sweep_report(paths, out or (paths[0] if single else Path()) / "report.html")
    _console().print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def predict(
    run_dir: RunDir,
    images: Annotated[list[Path], typer.Argument(help="Image files to classify.")],
    client: Client = None,
    top: Annotated[
        int, typer.Option("--top", min=1, help="Number of classes to print per image.")
    ] = 3,
    out: PredictionFile = None,
) -> None:
    """Classify images with the prompts that a run has learned."""
    from fedprompt.cli.predictions import show_predictions
    from fedprompt.experiment.predict import Classifier

    show_predictions(Classifier(run_dir, client).predictions(images, top), out)


@app.command()
def export(
    run_dir: RunDir,
    client: Client = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="File to write (default: RUN/class_embeddings.safetensors, with --client K "
            "RUN/class_embeddings-client-K.safetensors).",
        ),
    ] = None,
) -> None:
    """Write class embeddings that can be used with plain open_clip."""
    from fedprompt.experiment.predict import Classifier

    whose = "" if client is None else f"-client-{client}"
    path = out or run_dir / f"class_embeddings{whose}.safetensors"
    Classifier(run_dir, client).export(path)
    _console().print(f"wrote {path}", markup=False, highlight=False)


@app.command()
def methods(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as a Markdown page.")
    ] = False,
) -> None:
    """List the methods: their shared and private tensors, and their upload per client and round."""
    from fedprompt.cli.method_table import method_rows, method_table, methods_markdown

    if markdown:
        sys.stdout.write(methods_markdown(method_rows()))
    else:
        console = _console()
        console.print(method_table(console.width))


@app.command("list")
def list_configs(
    group: Annotated[
        str | None, typer.Argument(help="Only this group: experiment, sweep, method, ...")
    ] = None,
) -> None:
    """List the names that each group of a config may be set to, and what they stand for."""
    from fedprompt.experiment.groups import choices, description

    groups = ("experiment", "sweep", "method", "strategy", "data", "backbone", "protocol")
    if group is not None and group not in groups:
        raise UserError(f"list: no group {group!r}.{did_you_mean(group, groups)}")
    console = _console()
    for one in groups if group is None else (group,):
        # A name is never folded, so that it can be copied.
        table = Table("", Column("", overflow="fold"), show_header=False, **LOOK)
        table.columns[0].no_wrap = True
        for name in choices(one):
            table.add_row(Text(name), Text(description(one, name)))
        console.print(Text(one, style="bold"), table)


@app.command()
def doctor(
    cache: Annotated[
        str | None, typer.Option("--cache", help="Feature cache, as output.cache in a config.")
    ] = None,
) -> None:
    """Check versions, devices, disk and memory; the exit status is 1 if there is a problem."""
    from fedprompt.cli.doctor import examine

    findings = examine(cache)
    columns = [Column("", overflow="fold") for _ in range(3)]
    table = Table(*columns, box=None, show_header=False, padding=(0, 2, 0, 0))
    groups: set[str] = set()
    for finding in findings:
        if finding.value:
            group = "" if finding.group in groups else finding.group
            table.add_row(group, finding.name, Text(finding.value, overflow="fold"))
            groups.add(finding.group)
    _console().print(table, markup=False, highlight=False)
    problems = [finding.problem for finding in findings if finding.problem]
    for problem in problems:
        _console().print(f"PROBLEM {problem}", markup=False, highlight=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)
    _console().print("no problem found")


def main() -> None:
    """Run the command line.

    A `UserError` is printed on one line, with exit status 2, or 1 for a run that ended without a
    result. Ctrl-C, SIGTERM and SIGHUP end a command with one line as well, see
    `fedprompt.runtime.endings`.
    """
    use_lasting_output()
    handler: logging.Handler = (
        logging.StreamHandler()
        if wants_json()
        else RichHandler(console=Console(stderr=True), show_time=False, show_path=False)
    )
    # `SafeFormatter` is for text of peers, of which only `deploy` has any.
    handler.setFormatter(JsonLines() if wants_json() else logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    run_command(_command)


def _command() -> None:
    try:
        _check_working_folder()
        # Named explicitly, so that usage and completion are the same under `python -m fedprompt`.
        app(prog_name="fedprompt")
    except UserError as error:
        sys.stderr.write(f"fedprompt: {error}\n")
        sys.exit(1 if isinstance(error, RunFailed) else 2)
    except OSError as error:
        # What any path can meet, and only its owner can change. Others would be faults of ours.
        if error.errno not in REFUSED_BY_SYSTEM or error.filename is None:
            raise
        name = str(error.filename)
        shown = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."
        sys.stderr.write(f"fedprompt: cannot use {shown}: {error.strerror}.\n")
        sys.exit(2)


def _check_working_folder() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError(
            "the working folder has been removed; change to another folder and try again."
        ) from None


def _console() -> Console:
    return Console()
