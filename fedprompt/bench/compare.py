"""Run several ways of doing one job in turn, time them, and hold their results together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fedprompt.bench.machine import peak_mb, reset_peak

RTOL = 1e-4
Row = dict[str, Any]
"""One line of a table and one object of the JSON file."""


class MismatchError(Exception):
    """Two paths that must agree do not, so their times cannot be compared."""


@dataclass
class Measured:
    """One way of doing a job: seconds of each run, the last result, peak memory of the process.

    The peak is that of the first run, which is not timed when it is a warm-up.
    """

    result: Any = None
    peak_mb: float | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """Seconds of the fastest run."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """Median seconds."""
        return median(self.seconds)


def interleave(
    jobs: Mapping[str, Callable[[int], Any]],
    *,
    repeats: int,
    budget_s: float = float("inf"),
    warm_up: tuple[str, ...] = (),
    check: Callable[[int, dict[str, Any]], None] = lambda repeat, results: None,
) -> dict[str, Measured]:
    """Run the jobs in turn, `repeats` times; a job is told the number of the repeat.

    Args:
        jobs: by name; each returns what `check` wants to see.
        repeats: most repeats; all jobs get as many.
        budget_s: no further repeat starts after this many seconds.
        warm_up: jobs that run once before they are timed.
        check: sees the number and the results by name of every repeat; raises `MismatchError`.
    """
    measured = {name: Measured() for name in jobs}
    for name in warm_up:
        reset_peak()
        jobs[name](0)
        measured[name].peak_mb = peak_mb()
    began = time.perf_counter()
    for repeat in range(repeats):
        if repeat and time.perf_counter() - began > budget_s:
            break
        for name, job in jobs.items():
            one = measured[name]
            first = one.peak_mb is None
            if first:
                reset_peak()
            start = time.perf_counter()
            one.result = job(repeat)
            one.seconds.append(time.perf_counter() - start)
            if first:
                one.peak_mb = peak_mb()
        check(repeat, {name: one.result for name, one in measured.items()})
    return measured


def max_rel_diff(ours: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Largest difference of any named tensor, relative to the reference's largest value."""
    worst = 0.0
    for name, expected in reference.items():
        gap = (ours[name].detach().double() - expected.detach().double()).abs().max()
        scale = expected.detach().double().abs().max()
        # An all-zero reference would hide any error; NaN must not compare as small.
        worst = max(worst, float(gap / scale) if bool(scale > 0) else float("inf"))
        if not torch.isfinite(gap):
            return float("inf")
    return worst


def require_equal(case: str, difference: float, rtol: float = RTOL) -> None:
    """Refuse to compare the times of two paths that compute different things.

    Raises:
        MismatchError: one line with the case and the difference.
    """
    if not difference <= rtol:
        raise MismatchError(
            f"{case}: our path and the reference differ by {difference:.2e} of the largest value; "
            f"at most {rtol:.0e} is allowed."
        )


def row(
    case: str,
    ours: Measured,
    reference: Measured | None,
    *,
    divide: int = 1,
    difference: float | None = None,
    **more: Any,
) -> Row:
    """A row; our seconds are divided by `divide`, the number of clients that shared the call."""
    line: Row = {
        "case": case,
        "ours_s": ours.best / divide,
        "reference_s": None,
        "ratio": None,
        "max_rel_diff": difference,
        "peak_mb": ours.peak_mb,
        "ours_median_s": ours.median / divide,
        "repeats": len(ours.seconds),
    }
    if reference is not None:
        line |= {
            "reference_s": reference.best,
            "ratio": reference.best * divide / ours.best,
            "reference_peak_mb": reference.peak_mb,
            "reference_median_s": reference.median,
            "median_ratio": reference.median * divide / ours.median,
        }
    return line | more
