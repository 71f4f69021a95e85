"""Reads a run folder back into memory, for figures and reports; an error names what is damaged.

Shapes: K clients, C classes, D domains.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedprompt.data.partition import dense
from fedprompt.errors import UserError
from fedprompt.files.checksums import read_verified


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


def load_run(run_dir: Path) -> RunData:
    """Read a run folder and check everything that figures and reports use.

    Args:
        run_dir: The run folder, of a finished or unfinished run.

    Returns:
        The content of the folder.

    Raises:
        UserError: `config.yaml` or `metrics.jsonl` is missing, or any file is damaged; the
            message names the file and the line.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a run folder: there is no such folder.")
    metrics = run_dir / "metrics.jsonl"
    lines = _read_lines(metrics)
    for number, line in enumerate(lines, start=1):
        _check_metrics(line, f"{metrics}, line {number}")
    rounds = [line for line in lines if line["kind"] == "round"]
    if not rounds:
        raise UserError(f"{metrics} holds no round yet; let the run finish a round first.")
    timings_path = run_dir / "timings.jsonl"
    timings = _read_lines(timings_path) if timings_path.exists() else []
    for number, line in enumerate(timings, start=1):
        _check_numbers(
            line, ("train_s", "evaluate_s", "peak_memory_bytes"), f"{timings_path}, line {number}"
        )
    partition = _read_if_there(run_dir / "partition.json")
    if partition is not None:
        check_partition(partition, run_dir / "partition.json")
    summary = _read_if_there(run_dir / "summary.json")
    if summary is not None:
        _check_summary(summary, run_dir / "summary.json")
    return RunData(
        path=run_dir,
        config=_read_config(run_dir / "config.yaml"),
        rounds=rounds,
        local_only=[line for line in lines if line["kind"] == "local_only"],
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


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Read every complete line; a last one without newline is being written or was cut off."""
    # Lines are appended while the run goes on; the newline is what completes one.
    *lines, _ = _read_text(path).split("\n")
    return [_parse(line, str(path), number) for number, line in enumerate(lines, start=1)]


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


COSTS = ("bytes_up", "bytes_down", "client_steps", "seconds", "peak_memory_bytes")
"""What a run has cost, as keys of its summary."""
MEASURED = ("seconds", "peak_memory_bytes", "wall_s", "environment")
"""Keys of a summary whose values differ when the same run is repeated."""

# Every number that figures and reports read, by the part of a line or summary that contains it.
_NUMBERS = {
    "train": ("loss",),
    "clients": ("rejected",),
    "global": ("accuracy", "loss", "unanswered"),
    "personal": ("mean", "std", "worst", "p10", "clients", "accuracy", "not_finite"),
    "personal_on_global": ("mean", "std"),
}


def _check_metrics(line: Mapping[str, Any], where: str) -> None:
    if not isinstance(line.get("kind"), str) or not _is_whole(line.get("round")):
        raise UserError(f"{where} is damaged: it needs a 'kind' and a whole-number 'round'.")
    _check_numbers(line, ("bytes_up", "bytes_down", "client_steps"), where)
    _check_parts(line, _NUMBERS, where)
    for name in ("dropped", "diverged"):
        reasons = line.get(name, {})
        if not isinstance(reasons, dict) or not all(
            client.isdecimal() and isinstance(why, str) for client, why in reasons.items()
        ):
            raise UserError(f"{where} is damaged: '{name}' must hold a text per client.")


def _check_summary(summary: Mapping[str, Any], path: Path) -> None:
    where = str(path)
    _check_numbers(summary, ("uploaded_numbers_per_client_round", "wall_s", *COSTS), where)
    marks = summary.get("marks", [])
    if not isinstance(marks, list) or not all(isinstance(m, dict) and _is_mark(m) for m in marks):
        raise UserError(f"{where} is damaged: 'marks' must hold an object per marked client.")
    results = ("global", "personal", "personal_on_global")
    _check_parts(summary, results, where)
    for baseline in ("zero_shot", "local_only"):
        part = summary.get(baseline)
        if part is not None:
            if not isinstance(part, dict):
                raise UserError(f"{where} is damaged: '{baseline}' must be an object or null.")
            _check_numbers(part, ("accuracy",), f"{where}, {baseline}")
            _check_parts(part, results, f"{where}, {baseline}")


def _check_parts(holder: Mapping[str, Any], parts: Iterable[str], where: str) -> None:
    for part in parts:
        value = holder.get(part)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise UserError(f"{where} is damaged: '{part}' must be an object or null.")
        _check_numbers(value, _NUMBERS[part], f"{where}, {part}")
        if part == "personal" and not _is_paired(value):
            raise UserError(
                f"{where} is damaged: 'personal' needs as many 'clients' as 'accuracy' values."
            )


def _check_numbers(holder: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    for name in names:
        value = holder.get(name)
        for entry in value if isinstance(value, list) else [value]:
            if entry is not None and not isinstance(entry, (int, float)):
                raise UserError(f"{where} is damaged: '{name}' is {entry!r}, not a number.")


def _is_paired(personal: Mapping[str, Any]) -> bool:
    clients, accuracy = personal.get("clients") or [], personal.get("accuracy") or []
    both = isinstance(clients, list) and isinstance(accuracy, list)
    return (
        both
        and len(clients) == len(accuracy)
        and all(map(_is_whole, clients))
        # `_check_numbers` lets None pass, which means not measured elsewhere.
        and (None not in accuracy)
    )


def _is_mark(mark: Mapping[str, Any]) -> bool:
    """Whether an entry of `marks` has what `marks.mark_texts` reads."""
    number = mark.get("diverged_in_round")
    return (
        all(_is_whole(mark.get(name)) for name in ("client", "dropped", "asked"))
        and (number is None or _is_whole(number))
        and isinstance(mark.get("reason"), str)
    )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_partition(partition: Mapping[str, Any], path: Path) -> None:
    """Check that a partition description has consistent counts, before anything is drawn from it.

    Args:
        partition: The content of `partition.json`.
        path: Its file, for the error message.

    Raises:
        UserError: Counts are missing or do not fit together.
    """
    try:
        train_KC = dense(partition["train_counts"], len(partition["class_names"]))
        fits = True
        if partition.get("test_counts") is not None:
            fits = dense(partition["test_counts"], train_KC.shape[1]).shape == train_KC.shape
        hidden = partition.get("unlabelled_clients") or []
        fits = fits and set(hidden) <= set(range(len(train_KC)))
    except (KeyError, TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise UserError(
            f"{path} is damaged: it needs 'class_names' (C) and 'train_counts', a row per client "
            "of classes and counts in turn."
        )


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


REPORT, PRIVATE = "report.html", "private"
ERROR = "error.txt"
"""The traceback that a sweep leaves in the folder of a run that failed unexpectedly."""


METRICS, TIMINGS, PARTITION, CONFIG = (
    "metrics.jsonl",
    "timings.jsonl",
    "partition.json",
    "config.yaml",
)
