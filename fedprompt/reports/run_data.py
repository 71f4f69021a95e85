"""Reads a run folder back into memory, for figures and reports; an error names what is damaged.

Shapes: K clients, C classes, D domains.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedprompt.errors import UserError
from fedprompt.files.checksums import read_verified, verify
from fedprompt.reports.run_checks import COSTS as COSTS
from fedprompt.reports.run_checks import check_metrics, check_numbers, check_summary
from fedprompt.reports.run_checks import check_partition as check_partition
from fedprompt.reports.score_names import ACCURACY, PRECISION


@dataclass(frozen=True)
class RunData:
    """A run folder in memory; what an unfinished or old run lacks is None or empty.

    Attributes:
        path: The run folder.
        config: The complete config, as plain values.
        rounds: The lines of `metrics.jsonl` about rounds, beginning with round 0 before training.
        local_only: Its lines about the local-only baseline.
        partition: The content of `partition.json`.
        summary: The content of `summary.json`, which only a complete run has.
        timings: The lines of `timings.jsonl`, in seconds.
    """

    path: Path
    config: dict[str, Any]
    rounds: list[dict[str, Any]]
    local_only: list[dict[str, Any]]
    partition: dict[str, Any] | None
    summary: dict[str, Any] | None
    timings: list[dict[str, Any]]

    def last(self, part: str) -> dict[str, Any] | None:
        """Return a part of the last round in which it was measured.

        Args:
            part: A key of a metrics line: `global`, `personal`, ...
        """
        return next((line[part] for line in reversed(self.rounds) if line.get(part)), None)

    @property
    def score(self) -> str:
        """What the run's scores are called: `accuracy`, or `mAP` for images of several labels."""
        if self.summary is not None:
            return str(self.summary.get("score") or ACCURACY)
        several = any("micro_f1" in (line.get("global") or {}) for line in self.rounds)
        return PRECISION if several else ACCURACY


def load_run(run_dir: Path, *, history: bool = True, describe: bool = True) -> RunData:
    """Read a run folder and check everything that figures and reports use.

    A run of 10,000 clients has lists of 10,000 numbers in every tested round, of which a report
    draws the last ones, and a comparison of hundreds of runs no others either.

    Args:
        run_dir: The run folder, of a finished or unfinished run.
        history: Whether the lists of values by client are kept in all rounds, or only in the last
            one that has them. Means and other numbers are kept in any case.
        describe: Whether `partition` and the summary's lists of values by client are kept.

    Returns:
        The content of the folder.

    Raises:
        UserError: `config.yaml` or `metrics.jsonl` is missing, or any file is damaged; the
            message names the file and the line.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a run folder: there is no such folder.")
    metrics = run_dir / "metrics.jsonl"
    lines: dict[str, list[dict[str, Any]]] = {"round": [], "local_only": []}
    for number, line in enumerate(each_line(metrics), start=1):
        check_metrics(line, f"{metrics}, line {number}")
        of_kind = lines.setdefault(line["kind"], [])
        if not history:
            _forget_clients(of_kind, line, keep=describe)
        of_kind.append(line)
    rounds = lines["round"]
    if not rounds:
        raise UserError(f"{metrics} holds no round yet; let the run finish a round first.")
    timings_path = run_dir / "timings.jsonl"
    timings = list(each_line(timings_path)) if timings_path.exists() else []
    for number, line in enumerate(timings, start=1):
        check_numbers(
            line, ("train_s", "evaluate_s", "peak_memory_bytes"), f"{timings_path}, line {number}"
        )
    partition = _read_if_there(run_dir / "partition.json") if describe else None
    if partition is not None:
        check_partition(partition, run_dir / "partition.json")
    summary = _read_if_there(run_dir / "summary.json")
    if summary is not None:
        check_summary(summary, run_dir / "summary.json")
        if not describe:
            for holder in (summary, *(summary.get(b) or {} for b in ("zero_shot", "local_only"))):
                _without_clients(holder)
    return RunData(
        path=run_dir,
        config=_read_config(run_dir / "config.yaml"),
        rounds=rounds,
        local_only=lines["local_only"],
        partition=partition,
        summary=summary,
        timings=timings,
    )


def _read_text(path: Path) -> str:
    try:
        return read_verified(path).decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; is {path.parent} a run folder?") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: it is not UTF-8 text.") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None


def _parse(text: str, where: str, first_line: int = 1) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        text: The text to parse.
        where: The file, for error messages.
        first_line: The number of the text's first line within the file.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise UserError(f"{where} is damaged: it is nested too deeply.") from None
    except json.JSONDecodeError as error:
        at = f"{where}, line {first_line - 1 + error.lineno}, column {error.colno}"
        raise UserError(f"{at} is damaged: {error.msg}.") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise UserError(f"{where}, line {first_line} is damaged: a {kind}, not a JSON object.")
    return value


def each_line(path: Path) -> Iterator[dict[str, Any]]:
    """Read every complete line; a last one without newline is being written or was cut off."""
    try:
        verify(path)
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                text = line.decode("utf-8")
                # Lines are appended while the run goes on; the newline is what completes one.
                if text.endswith("\n"):
                    yield _parse(text[:-1], str(path), number)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; is {path.parent} a run folder?") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: it is not UTF-8 text.") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None


BY_CLIENT = ("personal", "personal_on_global")
"""Parts of a line or summary that have lists of values by client."""


def _without_clients(holder: dict[str, Any], among: Sequence[str] = BY_CLIENT) -> None:
    """Remove the lists of values by client, but not the clients whose models are not finite."""
    for name in among:
        if part := holder.get(name):
            holder[name] = {
                k: v
                for k, v in part.items()
                if not isinstance(v, (list, array)) or k == "not_finite"
            }


def _forget_clients(before: Sequence[dict[str, Any]], line: dict[str, Any], *, keep: bool) -> None:
    """Remove the lists by client that a newer line replaces, and keep its own in little memory.

    Args:
        before: The lines of the same kind until now.
        line: The newer line, which is changed too.
        keep: Whether the newer line keeps all of its lists, or the personal accuracies alone.
    """
    _without_clients(line.get("validation") or {})
    if not keep:
        _without_clients(line, ("personal_on_global",))
    personal = line.get("personal")
    if not personal:
        return
    for older in reversed(before):
        _without_clients(older)
        if older.get("personal"):
            break
    for name, kind in (("clients", "q"), ("accuracy", "d")):
        if name in personal:
            # A tenth of the memory of a list.
            personal[name] = array(kind, personal[name])


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file of a run folder.

    Args:
        path: The file.

    Returns:
        The object in it.

    Raises:
        UserError: The file is missing, damaged, or holds no JSON object.
    """
    return _parse(_read_text(path), str(path))


def _read_if_there(path: Path) -> dict[str, Any] | None:
    return read_object(path) if path.exists() else None


def _read_config(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        config = OmegaConf.to_container(OmegaConf.create(text))
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged: it must hold 'key: value' lines.")
    return {str(key): value for key, value in config.items()}


MEASURED = ("seconds", "peak_memory_bytes", "wall_s", "environment")
"""Keys of a summary whose values differ when the same run is repeated."""


def accuracy_of(part: Mapping[str, Any] | None) -> dict[int, float]:
    """Return accuracy by client id of a `personal` entry; empty if nothing was measured."""
    clients, accuracy = (part or {}).get("clients") or [], (part or {}).get("accuracy") or []
    return dict(zip(clients, accuracy, strict=True))


FEW_TEST_IMAGES = 5
"""An accuracy on fewer images than this moves by more than 20 points with a single image."""


def context_tokens(method: Mapping[str, Any]) -> int | None:
    """Return how many context tokens a text prompt of a method has; None without text prompts.

    Args:
        method: The `method` section of a config.
    """
    # A method that wraps another one has the keys of that method among its options.
    section = {**(method.get("options") or {}), **method}
    # A method with several prompts has so many tokens in each of them.
    keys = ("context_tokens", "shared_tokens", "text_tokens")
    found = [section[key] for key in keys if isinstance(section.get(key), int)]
    return found[0] if found else None


@dataclass(frozen=True)
class Series:
    """Measured points: round numbers and values, without the rounds that have no value."""

    x: list[int]
    y: list[float]


def series_of(lines: Sequence[Mapping[str, Any]], part: str, key: str) -> Series:
    """Return the finite values of `line[part][key]` by round.

    Args:
        lines: Metrics lines.
        part: A part of a metrics line, e.g. "global".
        key: The key of the value in that part.
    """
    points = [(line["round"], (line.get(part) or {}).get(key)) for line in lines]
    # A loss that has diverged to infinity or NaN would break the axes.
    kept = [(r, v) for r, v in points if v is not None and math.isfinite(v)]
    return Series([r for r, _ in kept], [v for _, v in kept])


def split_tests(
    run: RunData, lines: Sequence[Mapping[str, Any]]
) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
    """Separate the last round if its personal tests cover other clients than those before.

    Args:
        run: The run, whose config says whether rounds test their participants only.
        lines: Metrics lines of its rounds or of its local-only baseline.

    Returns:
        The lines whose personal tests cover the same kind of clients, and the last one apart, or an
        empty list if it is of the same kind.
    """
    if (run.config.get("evaluation") or {}).get("clients") != "participants":
        return lines, []
    # The last round tests all clients, whatever `evaluation.clients` says.
    last = (run.config.get("federation") or {}).get("rounds")
    return [x for x in lines if x["round"] != last], [x for x in lines if x["round"] == last]


CHECKPOINT, PROMPTS, SUMMARY = "checkpoint.safetensors", "prompts.safetensors", "summary.json"


REPORT, PRIVATE, STRATEGY, TESTED = "report.html", "private", "strategy", "tested.jsonl"
ERROR = "error.txt"
"""The traceback that a sweep leaves in the folder of a run that failed unexpectedly."""


METRICS, TIMINGS, PARTITION, CONFIG = (
    "metrics.jsonl",
    "timings.jsonl",
    "partition.json",
    "config.yaml",
)
