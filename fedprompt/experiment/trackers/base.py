"""The interface of an experiment tracker: it takes numbers per round, each of them once.

`metrics.jsonl` remains the record of a run; a tracker holds a copy for people who look at runs
there. A resumed run continues the same log. Rounds that are trained again give bitwise the same
numbers, so a tracker is given only what it does not contain yet, and no point is logged twice.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fedprompt.config.schema import Config, to_dict

NOT_METRICS = frozenset({"kind", "round", "environment", "shared", "private", "seed"})
"""Keys of metrics lines and summaries whose values are not measurements."""


@dataclass(frozen=True)
class Point:
    """One metrics line.

    Attributes:
        server_round: Its round.
        place: Its index among all lines of the run; local-only lines follow those of the rounds.
        metrics: Its numbers by name, e.g. `global/accuracy`.
    """

    server_round: int
    place: int
    metrics: Mapping[str, float]

    @classmethod
    def of(cls, line: Mapping[str, Any], rounds: int) -> Point:
        """Create the point of a metrics line.

        Args:
            line: A line of `metrics.jsonl`.
            rounds: The number of rounds of the run, after which local-only lines are placed.
        """
        alone = line.get("kind") == "local_only"
        server_round = int(line["round"])
        return cls(
            server_round=server_round,
            # Rounds are numbered from 0, the evaluation before training, so there are `rounds + 1`
            # lines.
            place=server_round + (rounds + 1 if alone else 0),
            metrics=numbers(line, "local_only/" if alone else ""),
        )


class RunLogger(ABC):
    """One tracker's log of one run. Its methods may raise any error; `Loggers` catches them."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    """Modules that must be importable."""

    @abstractmethod
    def __init__(self, folder: Path, config: Config) -> None:
        """Open the log of a run, or continue the log that an earlier start has begun.

        Args:
            folder: The run folder.
            config: The run's complete config, which is logged as well.
        """

    @abstractmethod
    def add(self, point: Point) -> None:
        """Write what the log lacks of this point, so that it survives a crash afterwards."""

    @abstractmethod
    def finish(self, summary: Mapping[str, float]) -> None:
        """Write the final numbers and mark the run as complete.

        Args:
            summary: Numbers by name; they are logged as `final/<name>`.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the log. It stays marked as incomplete unless `finish` was called."""


class SteppedLogger(RunLogger):
    """A tracker that can report which rounds of which metric it already contains."""

    _seen: dict[str, set[int]]

    @abstractmethod
    def write(self, metrics: Mapping[str, float], server_round: int) -> None:
        """Write numbers that the log does not contain yet, so that they survive a crash afterwards.

        Args:
            metrics: Numbers by name.
            server_round: The round they belong to, which is the tracker's step.
        """

    def add(self, point: Point) -> None:
        """Write those numbers of the point that the log does not contain for its round."""
        new = {
            name: value
            for name, value in point.metrics.items()
            if point.server_round not in self._seen.setdefault(name, set())
        }
        if new:
            self.write(new, point.server_round)
        # Recorded only after the write: if it fails, `Loggers.finish` writes these numbers again.
        for name in new:
            self._seen[name].add(point.server_round)


def numbers(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Collect the finite numbers of a nested record.

    Args:
        record: A metrics line or a summary. Lists, booleans and `NOT_METRICS` are left out.
        prefix: What every name begins with.

    Returns:
        Numbers by path, e.g. `{"global/accuracy": 0.61, ...}`.
    """
    found: dict[str, float] = {}

    def walk(holder: Mapping[str, Any], path: str) -> None:
        for key, value in holder.items():
            if isinstance(value, Mapping):
                walk(value, f"{path}{key}/")
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                if math.isfinite(value):
                    found[f"{path}{key}"] = float(value)

    walk({key: value for key, value in record.items() if key not in NOT_METRICS}, prefix)
    return found


def parameters(config: Config) -> dict[str, str | float | bool]:
    """Return the complete config as flat parameters, e.g. `{"training.lr": 0.002, ...}`."""
    flat: dict[str, str | float | bool] = {}

    def walk(holder: Mapping[str, Any], prefix: str) -> None:
        for key, value in holder.items():
            if isinstance(value, Mapping) and value:
                walk(value, f"{prefix}{key}.")
            elif isinstance(value, (str, int, float, bool)):
                flat[f"{prefix}{key}"] = value
            else:
                flat[f"{prefix}{key}"] = str(value)

    walk(to_dict(config), "")
    return flat
