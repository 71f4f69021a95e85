"""The Python interface: `fedprompt.compose`, `fedprompt.run`, `fedprompt.resume` and `Result`.

These functions do what the commands of the same names do, in the calling process.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fedprompt.config.schema import Config
from fedprompt.errors import StopRun, UserError
from fedprompt.evaluation.registry import figures, result_tables
from fedprompt.experiment import compose as composition
from fedprompt.experiment import run as experiments
from fedprompt.experiment.display import (
    Display,
    QuietDisplay,
    make_display,
)
from fedprompt.experiment.predict import Classifier
from fedprompt.experiment.resuming import read_config
from fedprompt.reports.draw import draw
from fedprompt.reports.format import Table
from fedprompt.reports.result_tables import protocol_tables, summary_table
from fedprompt.reports.run_data import SUMMARY, RunData, load_run
from fedprompt.reports.run_figures import run_figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OnRound = Callable[[Mapping[str, Any]], bool | None]
OnEnd = Callable[["Result"], None]
WIDTH = 100
"""Characters per line of a printed table."""


def compose(experiment: str | Path | Config, /, *overrides: str, **changes: Any) -> Config:
    """Compose the config of an experiment without running it.

    Args:
        experiment: the name of a shipped experiment, a YAML file, or a config to change.
        *overrides: changes as on the command line, e.g. `"federation.rounds=20"`.
        **changes: values by key. A section takes a dict, `federation={"rounds": 20}`, or a dotted
            key, `**{"federation.rounds": 20}`.

    Returns:
        The complete, checked and frozen config.

    Raises:
        UserError: a file is missing, a key is unknown, or a value has the wrong type or is
            impossible.
    """
    # `experiment` is positional-only, so that `experiment=...` can be a key of `changes`.
    return composition.compose(experiment, overrides, changes)


def run(
    experiment: str | Path | Config,
    /,
    *overrides: str,
    progress: bool = False,
    on_round: OnRound | None = None,
    on_end: OnEnd | None = None,
    **changes: Any,
) -> Result:
    """Run an experiment and write its run folder.

    For example, `fedprompt.run("quickstart", method="promptfl", seed=2)`.

    Args:
        experiment: the name of a shipped experiment, a YAML file, or a config to change.
        *overrides: changes as on the command line, e.g. `"federation.rounds=20"`.
        progress: whether to show what `fedprompt run` shows; by default nothing is printed.
        on_round: called after every round with the round's metrics, once its checkpoint is
            written. If it returns False or raises `StopRun`, the run stops there and can be
            resumed.
        on_end: called with the result when the run is complete or has been stopped.
        **changes: values by key, as for `compose`.

    Returns:
        The result, which reads the run folder.

    Raises:
        UserError: the config is wrong, data or weights cannot be read, or the folder cannot be
            written.
    """
    config = compose(experiment, *overrides, **changes)
    return _observe(lambda display: experiments.run(config, display), progress, on_round, on_end)


def resume(
    path: str | Path,
    /,
    *overrides: str,
    progress: bool = False,
    on_round: OnRound | None = None,
    on_end: OnEnd | None = None,
) -> Result:
    """Continue an interrupted or stopped run; the result is the same as without interruption.

    Args:
        path: the run folder. A finished run is not changed, unless it is given more rounds.
        *overrides: `"federation.rounds=80"` goes on for longer; `output.loggers` and
            `output.report` can be changed as well, and nothing else.
        progress: whether to show what `fedprompt run` shows; by default nothing is printed.
        on_round: called after every remaining round, as for `run`.
        on_end: called with the result when the run is complete or has been stopped.

    Returns:
        The result, which reads the run folder.

    Raises:
        UserError: the folder holds no run, or the data set has changed since the run began.
    """
    folder = Path(path)
    return _observe(
        lambda display: experiments.resume(folder, display, overrides=overrides),
        progress,
        on_round,
        on_end,
    )


@dataclass(frozen=True)
class Result:
    """The contents of a run folder; the run may be unfinished.

    Attributes:
        path: the run folder.
    """

    path: Path

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return self._data.summary is not None

    @cached_property
    def config(self) -> Config:
        """The complete config of the run."""
        return read_config(self.path)

    @property
    def summary(self) -> dict[str, Any]:
        """The contents of `summary.json`: accuracies of the last round, traffic, protocols.

        Raises:
            UserError: the run is not finished.
        """
        summary = self._data.summary
        if summary is None:
            raise UserError(f"{self.path} is not finished; continue it with fedprompt.resume.")
        return summary

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One flat dict per round, for example for `pandas.DataFrame`.

        Keys of parts are joined by dots, as in `train.loss`, `global.accuracy` and
        `personal.mean`. Accuracies are fractions. `personal.accuracy` is a list with one value
        per tested client, `personal.clients` lists their ids.
        """
        return flat_lines(self._data.rounds)

    @property
    def local_only(self) -> list[dict[str, Any]]:
        """As `metrics`, for the baseline in which every client trains alone; it may be empty."""
        return flat_lines(self._data.local_only)

    def table(self) -> str:
        """The tables that `fedprompt run` prints at the end, as text.

        Raises:
            UserError: the run is not finished.
        """
        text = io.StringIO()
        # In Jupyter, rich would otherwise display the table instead of writing it to `text`.
        console = Console(
            file=text, width=WIDTH, highlight=False, force_terminal=False, force_jupyter=False
        )
        tables = result_tables(self.summary, str(self.path / SUMMARY))
        console.print(summary_table(self.summary, WIDTH))
        for table in protocol_tables(tables, WIDTH):
            console.print(table)
        return text.getvalue()

    def figures(self) -> dict[str, Figure]:
        """The figures of the run and of its protocols by name, as matplotlib figures.

        Figures without data are left out. A notebook shows a figure that is the last value of a
        cell: `result.figures()["accuracy_per_round"]`.
        """
        run = self._data
        return {figure.name: draw(figure) for figure in (*run_figures(run), *figures(run))}

    def classifier(self, client: int | None = None) -> Classifier:
        """The trained model, which classifies image files.

        Args:
            client: the client whose personalised model is loaded; None loads the global model.

        Returns:
            The classifier.

        Raises:
            UserError: the run is not finished, there is no such client, or the method has no
                global model.
        """
        return Classifier(self.path, client)

    @cached_property
    def _data(self) -> RunData:
        return load_run(self.path)


def flat_lines(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Flatten metrics lines by joining nested keys with dots.

    Args:
        lines: lines of `metrics.jsonl`.

    Returns:
        One flat dict per line. Not all lines need to have the same keys.
    """
    flat = [dict(_flatten(line)) for line in lines]
    # A part that was not measured in a round is null in its line. It is dropped if other lines have
    # keys for it: a column `global` of nulls beside `global.accuracy` would say nothing.
    parts = {key.rpartition(".")[0] for line in flat for key in line}
    return [{key: value for key, value in line.items() if key not in parts} for line in flat]


def _flatten(line: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in line.items():
        if isinstance(value, Mapping):
            items += _flatten(value, f"{prefix}{key}.")
        else:
            items.append((f"{prefix}{key}", value))
    return items


class _Observer:
    """A display that also calls a function after every round.

    The loop over rounds calls a display after the round's metrics and checkpoint are on disk, so a
    run that is stopped there loses nothing.
    """

    def __init__(self, display: Display, on_round: OnRound | None) -> None:
        self._display = display
        self._on_round = on_round

    def start(self, title: str, rounds: int, first_round: int) -> None:
        self._display.start(title, rounds, first_round)

    def message(self, text: str) -> None:
        self._display.message(text)

    def phase(self, text: str) -> None:
        self._display.phase(text)

    def round(self, record: Mapping[str, Any], eta_s: float | None) -> None:
        self._display.round(record, eta_s)
        if self._on_round is not None and self._on_round(record) is False:
            raise StopRun

    def finish(
        self,
        summary: Mapping[str, Any],
        run_dir: Path | str | None = None,
        tables: Sequence[Table] = (),
    ) -> None:
        self._display.finish(summary, run_dir, tables)

    def close(self) -> None:
        self._display.close()


def _observe(
    start: Callable[[Display], Path],
    progress: bool,
    on_round: OnRound | None,
    on_end: OnEnd | None,
) -> Result:
    """Start or resume a run with its callbacks.

    Args:
        start: starts or resumes the run with a display, and returns the run folder.
        progress: whether to show the progress.
        on_round: as for `run`.
        on_end: as for `run`.
    """
    display = _Observer(make_display() if progress else QuietDisplay(Console(quiet=True)), on_round)
    try:
        result = Result(start(display))
    finally:
        display.close()
    if on_end is not None:
        on_end(result)
    return result
