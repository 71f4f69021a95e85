"""What an experiment tracker is to a run: something that takes numbers per round, once each.

`metrics.jsonl` stays the record; a tracker is a copy of it for those who look at runs there. A
resumed run goes on in the same log: rounds that are trained again have bitwise the same numbers, so
a tracker is given only what it does not hold yet, and no point is in it twice.
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
"""Keys of metrics lines and summaries that are no measurement."""


@dataclass(frozen=True)
class Point:
    """One metrics line: its round, its place in the order of all lines, its numbers by name."""

    server_round: int
    place: int
    metrics: Mapping[str, float]

    @classmethod
    def of(cls, line: Mapping[str, Any], rounds: int) -> Point:
        """Of a line of `metrics.jsonl`; local-only lines come after those of all `rounds`."""
        alone = line.get("kind") == "local_only"
        server_round = int(line["round"])
        return cls(
            server_round=server_round,
            place=server_round + (rounds + 1 if alone else 0),
            metrics=numbers(line, "local_only/" if alone else ""),
        )


class RunLogger(ABC):
    """One tracker's log of one run. Any error of the tracker may leave these methods."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    """Modules that must be importable."""

    @abstractmethod
    def __init__(self, folder: Path, config: Config) -> None:
        """Open the log of the run in `folder`, or the one that an earlier start has begun."""

    @abstractmethod
    def add(self, point: Point) -> None:
        """Write what the log lacks of this point, durably."""

    @abstractmethod
    def finish(self, summary: Mapping[str, float]) -> None:
        """Write the final numbers, named `final/...`, and say that the run is complete."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the log; it is incomplete unless `finish` was called."""


class SteppedLogger(RunLogger):
    """A tracker that can be asked which rounds of which metric it holds."""

    _seen: dict[str, set[int]]

    @abstractmethod
    def write(self, metrics: Mapping[str, float], server_round: int) -> None:
        """Write these numbers, none of which the log holds, durably."""

    def add(self, point: Point) -> None:
        """Write the numbers that the log has no point of this round for."""
        new = {
            name: value
            for name, value in point.metrics.items()
            if point.server_round not in self._seen.setdefault(name, set())
        }
        if new:
            self.write(new, point.server_round)
        for name in new:
            self._seen[name].add(point.server_round)


def numbers(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Finite numbers at any depth as `{"global/accuracy": 0.61, ...}`; lists are left out."""
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
    """The complete config as flat parameters: `{"training.lr": 0.002, ...}`."""
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
