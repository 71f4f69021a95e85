"""Formats numbers, durations and tables as text, for the terminal, tables and pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MISSING = "-"
"""What is printed for a value that was not measured."""


def human_bytes(n: int) -> str:
    """Format bytes in binary units: `640 B`, `80.0 KiB`, `1.5 MiB`."""
    if n < 1024:
        return f"{n} B"
    size = float(n)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        # Compared after rounding, so that 1 MiB - 1 B does not read "1024.0 KiB".
        if round(size, 1) < 1024 or unit == "TiB":
            break
    return f"{size:.1f} {unit}"


def human_time(seconds: float) -> str:
    """Format a duration as `0:12`, `3:05` or `1:02:03`."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def plural(number: int, noun: str) -> str:
    """Format a count with its noun: `1 round`, `2 rounds`, `1,200 replies`."""
    if number != 1:
        noun = f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2] not in "aeiou" else f"{noun}s"
    return f"{number:,} {noun}"


def percent(fraction: float | None) -> str:
    """Format an accuracy in [0, 1] as `61.2 %`, or `-` if it was not measured."""
    return MISSING if fraction is None else f"{100 * fraction:.1f} %"


def percent_spread(mean: float | None, std: float | None) -> str:
    """Format mean and standard deviation as `78.9 ± 6.1 %`; the mean alone without a deviation."""
    if mean is None or std is None:
        return percent(mean)
    return f"{100 * mean:.1f} ± {100 * std:.1f} %"


@dataclass(frozen=True)
class ResultRow:
    """The results of one model, in [0, 1]; None means not measured.

    Attributes:
        name: The model, e.g. `zero-shot`.
        global_accuracy: Accuracy on the server's test set.
        mean: Mean over clients of the accuracy on their own test images.
        std: Standard deviation of these accuracies over clients.
        worst: The lowest of these accuracies.
        p10: Their 10th percentile.
        on_global_mean: Mean over clients of the accuracy of their models on the server's test set.
        on_global_std: Standard deviation of the latter over clients.
        attack_success: Share of triggered test images that get the attackers' target class.
    """

    name: str
    global_accuracy: float | None
    mean: float | None
    std: float | None
    worst: float | None
    p10: float | None
    on_global_mean: float | None
    on_global_std: float | None
    attack_success: float | None = None

    @classmethod
    def of(cls, name: str, part: Mapping[str, Any]) -> ResultRow:
        """Create a row from the `global`, `personal` and `personal_on_global` entries of `part`.

        Args:
            name: The model.
            part: A summary, or the part of one that holds a baseline.
        """
        whole = part.get("global") or {}
        personal = part.get("personal") or {}
        on_global = part.get("personal_on_global") or {}
        return cls(
            name=name,
            global_accuracy=whole.get("accuracy"),
            mean=personal.get("mean"),
            std=personal.get("std"),
            worst=personal.get("worst"),
            p10=personal.get("p10"),
            on_global_mean=on_global.get("mean"),
            on_global_std=on_global.get("std"),
            attack_success=(part.get("backdoor") or {}).get("success"),
        )


def result_rows(summary: Mapping[str, Any]) -> list[ResultRow]:
    """Return the results of zero-shot, local-only and the method, without baselines not run.

    Args:
        summary: The content of `summary.json`. The method is always the last row. If its round was
            chosen on validation images, the row before shows its last round.
    """
    rows = []
    zero_shot = summary.get("zero_shot")
    if zero_shot:
        # Zero-shot's global accuracy is not nested: `{"accuracy": ..., "personal": {...}}`.
        rows.append(ResultRow.of("zero-shot", {"global": zero_shot, **zero_shot}))
    local_only = summary.get("local_only")
    if local_only:
        rows.append(ResultRow.of("local-only", local_only))
    method = str(summary.get("method", "method"))
    if summary.get("last"):
        rows.append(ResultRow.of(f"{method}, last round", summary["last"]))
    rows.append(ResultRow.of(method, summary))
    return rows


def best_of(values: Sequence[float | None]) -> set[int]:
    """Return the indices of the highest values; none if fewer than two are known.

    Args:
        values: Accuracies, None where one was not measured.
    """
    known = [value for value in values if value is not None]
    top = max(known, default=None)
    return {i for i, value in enumerate(values) if value == top} if len(known) > 1 else set()


@dataclass(frozen=True)
class Table:
    """A table of text cells; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """Format the table in Markdown, without its title and note."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(c.replace('|', '/') for c in line)} |" for line in lines)
