"""Trackers that a run also reports to: `output.loggers=[tensorboard, mlflow, wandb]`.

Each is an optional extra (`pip install 'fedprompt[mlflow]'`). A tracker that fails while a run goes
on never ends it: it gets what it lacks when the run ends, or when the run is resumed.
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
"""Name in a config, which is also the module of this package and the extra: its class."""


def check_names(names: Sequence[str]) -> None:
    """Refuse unknown and repeated names; raises `UserError` with the nearest name."""
    for name in names:
        if name not in LOGGERS:
            hint = did_you_mean(name, list(LOGGERS))
            raise UserError(f"config: output.loggers: no logger {name!r}.{hint}")
    if len(set(names)) < len(names):
        raise UserError(f"config: output.loggers is {list(names)}; it names a logger twice.")


def check_installed(names: Sequence[str]) -> None:
    """Refuse to begin what could not be logged.

    Raises:
        UserError: a tracker's package is missing; the message has the command that installs it.
    """
    missing = [name for name in names if not is_installed(name)]
    if missing:
        extras = ",".join(missing)
        raise UserError(
            f"output.loggers: {' and '.join(missing)} not installed; "
            f"pip install 'fedprompt[{extras}]', or leave it out."
        )


def is_installed(module: str) -> bool:
    """Whether a package can be imported; a mere folder of that name cannot."""
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None


class Loggers:
    """The loggers of one run. After `open` no error of a tracker leaves these methods."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._rounds = config.federation.rounds
        self._open: list[RunLogger] = []
        self._behind: set[str] = set()

    def open(self) -> None:
        """Open every log, that of an earlier start where there is one.

        Raises:
            UserError: a log cannot be opened (no login, no server, no right to write).
        """
        check_installed(self._config.output.loggers)
        for name in self._config.output.loggers:
            module = importlib.import_module(f"{__name__}.{name}")
            make: type[RunLogger] = getattr(module, LOGGERS[name])
            try:
                self._open.append(make(self._folder, self._config))
            except UserError:
                raise
            except Exception as error:  # whatever a tracker raises
                raise UserError(
                    f"output.loggers: {name} cannot be opened: {_reason(error)}; mend that or "
                    f"leave {name} out."
                ) from None

    def line(self, line: Mapping[str, Any]) -> None:
        """Log one metrics line, but for what a log holds already."""
        point = Point.of(line, self._rounds)
        for logger in self._open:
            if logger.name not in self._behind:
                self._try(logger, lambda logger=logger: logger.add(point))  # type: ignore[misc]

    def finish(self, summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
        """The run is complete: what a log still lacks of `lines`, then the summary's numbers."""
        points = [Point.of(line, self._rounds) for line in lines]
        final = numbers(summary)

        def complete(logger: RunLogger) -> None:
            for point in points:
                logger.add(point)
            logger.finish(final)

        for logger in self._open:
            self._try(logger, lambda logger=logger: complete(logger))  # type: ignore[misc]

    def close(self) -> None:
        """Close what is open; safe to call twice."""
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
