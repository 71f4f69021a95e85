"""Experiment trackers to which a run also reports: `output.loggers=[tensorboard, mlflow, wandb]`.

They are written by the process that runs the rounds, one point after each round. Each tracker is an
optional extra (`pip install 'fedprompt[mlflow]'`). A tracker that fails during a run never stops
the run: it receives what it lacks when the run ends, or when the run is resumed.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedprompt.config.schema import Config
from fedprompt.errors import UserError, did_you_mean
from fedprompt.experiment.trackers.base import Point, RunLogger, numbers

__all__ = ["LOGGERS", "Loggers", "check_installed", "check_names"]

log = logging.getLogger("fedprompt.loggers")

LOGGERS = {"mlflow": "MLflow", "tensorboard": "TensorBoard", "wandb": "WandB"}
"""Class of each tracker by its name, which is also its module in this package and its extra."""


def check_names(names: Sequence[str]) -> None:
    """Refuse unknown and repeated names.

    Raises:
        UserError: A name is unknown (the message suggests the nearest one) or is listed twice.
    """
    for name in names:
        if name not in LOGGERS:
            hint = did_you_mean(name, list(LOGGERS))
            raise UserError(f"config: output.loggers: no logger {name!r}.{hint}")
    if len(set(names)) < len(names):
        raise UserError(f"config: output.loggers is {list(names)}; it names a logger twice.")


def check_installed(names: Sequence[str]) -> None:
    """Check before a run starts that the packages of its trackers are installed.

    Args:
        names: Names of trackers, as in `output.loggers`.

    Raises:
        UserError: A package is missing; the message contains the command that installs it.
    """
    missing = [name for name in names if not is_installed(name)]
    if missing:
        extras = ",".join(missing)
        raise UserError(
            f"output.loggers: {' and '.join(missing)} not installed; "
            f"pip install 'fedprompt[{extras}]', or leave it out."
        )


def is_installed(module: str) -> bool:
    """Return whether a package can be imported, not counting a mere folder of that name."""
    found = importlib.util.find_spec(module)
    # A folder without `__init__.py`, e.g. the `wandb/` in which W&B puts its files, is a namespace
    # package to Python, which has no origin.
    return found is not None and found.origin is not None


class Loggers:
    """All trackers of one run. Once they are open, no error of a tracker leaves these methods.

    Args:
        config: The run's config, whose `output.loggers` names the trackers.
        folder: The run folder.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._rounds = config.federation.rounds
        self._open: list[RunLogger] = []
        self._behind: set[str] = set()

    def open(self, *, resumed: bool = False) -> None:
        """Open the log of every tracker, continuing the log of an earlier start of the run.

        Args:
            resumed: Whether the run has begun before. It then goes on without a tracker that
                cannot be opened; the tracker receives what it lacks at the next start.

        Raises:
            UserError: A log of a new run cannot be opened, e.g. without a login, a server or write
                permission.
        """
        for name in self._config.output.loggers:
            try:
                check_installed([name])
                module = importlib.import_module(f"{__name__}.{name}")
                make: type[RunLogger] = getattr(module, LOGGERS[name])
                self._open.append(make(self._folder, self._config))
            except Exception as error:  # whatever a tracker raises
                if resumed:
                    log.warning(
                        "%s cannot be opened: %s; the run goes on without it, and metrics.jsonl "
                        "has everything",
                        name,
                        _reason(error),
                    )
                elif isinstance(error, UserError):
                    raise
                else:
                    raise UserError(
                        f"output.loggers: {name} cannot be opened: {_reason(error)}; correct that, "
                        f"or leave {name} out of output.loggers."
                    ) from None

    def line(self, line: Mapping[str, Any]) -> None:
        """Log one metrics line.

        Args:
            line: A line of `metrics.jsonl`. Numbers that a log already contains are skipped.
        """
        point = Point.of(line, self._rounds)
        for logger in self._open:
            # After a failure a log waits for `finish`: W&B's log only counts the lines it has
            # taken, so a later line would hide that an earlier one is missing.
            if logger.name not in self._behind:
                self._try(logger, lambda logger=logger: logger.add(point))  # type: ignore[misc]

    def finish(self, summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
        """Complete the logs at the end of the run.

        Args:
            summary: The run's summary, whose numbers are logged as `final/...`.
            lines: All metrics lines of the run, of which each log receives those that it lacks.
        """
        points = [Point.of(line, self._rounds) for line in lines]
        final = numbers(summary)

        def complete(logger: RunLogger) -> None:
            for point in points:
                logger.add(point)
            logger.finish(final)

        for logger in self._open:
            self._try(logger, lambda logger=logger: complete(logger))  # type: ignore[misc]

    def close(self) -> None:
        """Close all open logs. It is safe to call this twice."""
        while self._open:
            logger = self._open.pop()
            self._try(logger, logger.close)

    def _try(self, logger: RunLogger, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # a tracker's trouble must not end a run
            self._behind.add(logger.name)
            log.warning(
                "%s: %s; the run goes on, metrics.jsonl has everything",
                logger.name,
                _reason(error),
            )


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
