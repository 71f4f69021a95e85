"""Runs several implementations of one job in turn, times them and compares their results.

Every benchmark measures our implementation beside a slower reference, and refuses to report a ratio
unless both have computed the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fedprompt.bench.machine import peak_mb
from fedprompt.runtime import cards
from fedprompt.runtime.peak_memory import reset_peak_memory

RTOL = 1e-4
"""Largest accepted difference relative to the largest value: float32 rounding over a whole step."""
Row = dict[str, Any]
"""One line of a table and one object of the JSON file."""


def clock() -> float:
    """Seconds on a monotonic clock, once every device has done the work that it was given."""
    cards.wait_for_all()
    return time.perf_counter()


class MismatchError(Exception):
    """The results of two implementations differ, so their times cannot be compared."""


@dataclass
class Measured:
    """One implementation's last result, peak memory of the process in MB, and seconds of each run.

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
    """Run the jobs in turn, `repeats` times.

    They alternate, so that a change in the machine's load affects all of them.

    Args:
        jobs: functions by name, from the number of the repeat to a result.
        repeats: largest number of repeats; all jobs get the same number.
        budget_s: seconds after which no further repeat starts.
        warm_up: names of jobs that run once before they are timed.
        check: gets the number of a repeat and its results by name; raises `MismatchError` when
            they differ.

    Returns:
        What was measured, by name.
    """
    measured = {name: Measured() for name in jobs}
    for name in warm_up:
        reset_peak_memory()
        jobs[name](0)
        measured[name].peak_mb = peak_mb()
    began = clock()
    for repeat in range(repeats):
        # The first repeat always runs, so that every job has a time.
        if repeat and clock() - began > budget_s:
            break
        for name, job in jobs.items():
            entry = measured[name]
            first = entry.peak_mb is None
            # Outside of the timed part, because it returns memory to the system.
            if first:
                reset_peak_memory()
            start = clock()
            entry.result = job(repeat)
            entry.seconds.append(clock() - start)
            if first:
                entry.peak_mb = peak_mb()
        check(repeat, {name: entry.result for name, entry in measured.items()})
    return measured


def max_rel_diff(ours: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Largest difference between two results.

    Args:
        ours: our tensors by name; it may have more than `reference`.
        reference: the tensors to compare with.

    Returns:
        The largest absolute difference of any tensor divided by the reference's largest absolute
        value in it; infinite if a value is not finite.
    """
    worst = 0.0
    for name, expected in reference.items():
        # In float64, so that the subtraction itself does not round.
        mine, theirs = (t.detach().cpu().double() for t in (ours[name], expected))
        gap = (mine - theirs).abs().max()
        scale = theirs.abs().max()
        # An all-zero reference would hide any error; NaN must not compare as small.
        worst = max(worst, float(gap / scale) if bool(scale > 0) else float("inf"))
        if not torch.isfinite(gap):
            return float("inf")
    return worst


def require_equal(case: str, difference: float, rtol: float = RTOL) -> None:
    """Refuse to compare the times of two implementations that compute different things.

    Args:
        case: names the case in the message.
        difference: from `max_rel_diff`.
        rtol: the largest accepted difference.

    Raises:
        MismatchError: the difference is larger, or not a number.
    """
    if not difference <= rtol:  # written this way round, because every comparison with NaN is false
        raise MismatchError(
            f"{case}: our result and the reference's differ by {difference:.2e} of the largest "
            f"value; "
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
    """A row of the result.

    Args:
        case: what was measured.
        ours: our measurements.
        reference: the reference's, or None where there is none.
        divide: number of clients that shared one call of ours; its seconds are divided by it.
        difference: of the results, from `max_rel_diff`.
        more: further values of the row.

    Returns:
        Seconds per client, peak memory in MB, and `ratio`: the reference's best time divided by
        ours.
    """
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
