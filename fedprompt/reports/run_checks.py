"""Checks of what was read from a run folder, before anything is drawn from it.

An error names the file, the line and the entry that is damaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedprompt.data.partition import dense
from fedprompt.errors import UserError

COSTS = ("bytes_up", "bytes_down", "client_steps", "seconds", "peak_memory_bytes")
"""What a run has cost, as keys of its summary."""
# Every number that figures and reports read, by the part of a line or summary that contains it.
_NUMBERS = {
    "train": ("loss",),
    "clients": ("rejected",),
    "global": ("accuracy", "loss", "unanswered"),
    "personal": ("mean", "std", "worst", "p10", "clients", "accuracy", "not_finite"),
    "personal_on_global": ("mean", "std"),
    "backdoor": ("success", "without_trigger", "attackers"),
}


def check_metrics(line: Mapping[str, Any], where: str) -> None:
    """Check one line of `metrics.jsonl`.

    Args:
        line: The line.
        where: Its file and number, for the error message.

    Raises:
        UserError: It lacks something, or a value is of the wrong kind.
    """
    if not isinstance(line.get("kind"), str) or not _is_whole(line.get("round")):
        raise UserError(f"{where} is damaged: it needs a 'kind' and a whole-number 'round'.")
    check_numbers(line, ("bytes_up", "bytes_down", "client_steps"), where)
    _check_parts(line, _NUMBERS, where)
    for name, statistic in _statistics(line, where).items():
        check_numbers(statistic, ("mean", "std", "max"), f"{where}, statistics, {name}")
    for name in ("dropped", "diverged"):
        reasons = line.get(name, {})
        if not isinstance(reasons, dict) or not all(
            client.isdecimal() and isinstance(why, str) for client, why in reasons.items()
        ):
            raise UserError(f"{where} is damaged: '{name}' must hold a text per client.")


def _statistics(line: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    statistics: Any = line.get("statistics", {})
    if isinstance(statistics, dict) and all(isinstance(s, dict) for s in statistics.values()):
        return statistics
    raise UserError(f"{where} is damaged: 'statistics' must hold an object per statistic.")


def check_summary(summary: Mapping[str, Any], path: Path) -> None:
    """Check the content of `summary.json`.

    Args:
        summary: The content.
        path: Its file, for the error message.

    Raises:
        UserError: A value is of the wrong kind.
    """
    where = str(path)
    check_numbers(summary, ("uploaded_numbers_per_client_round", "wall_s", *COSTS), where)
    marks = summary.get("marks", [])
    if not isinstance(marks, list) or not all(isinstance(m, dict) and _is_mark(m) for m in marks):
        raise UserError(f"{where} is damaged: 'marks' must hold an object per marked client.")
    results = ("global", "personal", "personal_on_global", "backdoor")
    _check_parts(summary, results, where)
    for baseline in ("zero_shot", "local_only"):
        part = summary.get(baseline)
        if part is not None:
            if not isinstance(part, dict):
                raise UserError(f"{where} is damaged: '{baseline}' must be an object or null.")
            check_numbers(part, ("accuracy",), f"{where}, {baseline}")
            _check_parts(part, results, f"{where}, {baseline}")


def _check_parts(holder: Mapping[str, Any], parts: Iterable[str], where: str) -> None:
    for part in parts:
        value = holder.get(part)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise UserError(f"{where} is damaged: '{part}' must be an object or null.")
        check_numbers(value, _NUMBERS[part], f"{where}, {part}")
        if part == "personal" and not _is_paired(value):
            raise UserError(
                f"{where} is damaged: 'personal' needs as many 'clients' as 'accuracy' values."
            )


def check_numbers(holder: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    """Check that some values, or the entries of lists, are numbers or null.

    Args:
        holder: A line, a summary or a part of one.
        names: The keys of the values; missing ones are left out.
        where: What holds them, for the error message.

    Raises:
        UserError: One of them is something else.
    """
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
