"""Comparisons: jobs in turn, honest differences, and one line where results disagree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedprompt.bench.compare import (
    Measured,
    MismatchError,
    interleave,
    max_rel_diff,
    require_equal,
    row,
)
from fedprompt.bench.reference import ReferenceCoOp


def test_jobs_take_turns_and_the_check_sees_every_repeat() -> None:
    calls, seen = [], []

    def job(name: str) -> Callable[[int], str]:
        return lambda repeat: calls.append(f"{name}{repeat}") or f"{name}{repeat}"  # type: ignore[func-returns-value]

    measured = interleave(
        {"a": job("a"), "b": job("b")},
        repeats=2,
        warm_up=("a",),
        check=lambda repeat, results: seen.append((repeat, dict(results))),
    )
    assert calls == ["a0", "a0", "b0", "a1", "b1"]
    assert seen == [(0, {"a": "a0", "b": "b0"}), (1, {"a": "a1", "b": "b1"})]
    assert len(measured["a"].seconds) == len(measured["b"].seconds) == 2


def test_no_repeat_starts_after_the_budget() -> None:
    measured = interleave({"a": lambda repeat: None}, repeats=5, budget_s=0)
    assert len(measured["a"].seconds) == 1


def test_a_row_divides_by_the_clients_of_a_call() -> None:
    line = row("x", Measured(seconds=[4.0, 2.0]), Measured(seconds=[10.0, 6.0]), divide=4)
    assert (line["ours_s"], line["reference_s"], line["ratio"]) == (0.5, 6.0, 12.0)
    assert line["median_ratio"] == pytest.approx(8.0 / 0.75)


def test_differences_are_relative_to_the_largest_value_and_never_hide() -> None:
    reference = {"x": torch.tensor([1.0, -4.0]), "y": torch.tensor([2.0])}
    ours = {"x": torch.tensor([1.0, -4.0]), "y": torch.tensor([2.0002])}
    assert max_rel_diff(ours, reference) == pytest.approx(1e-4, rel=1e-3)
    nan = {**ours, "x": torch.tensor([float("nan"), -4.0])}
    for bad, against in ((nan, reference), (ours, {"x": torch.zeros(2)})):
        with pytest.raises(MismatchError, match="differ"):
            require_equal("case", max_rel_diff(bad, against))


@pytest.mark.parametrize("place", ["class_features", "forward"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("step", "--classes", "5", "--context", "2", "--repeats", "1"),
        ("round", "--clients", "2", "--classes", "3", "--rounds", "2", "--small", ""),
        ("round", "--clients", "2", "--classes", "3", "--rounds", "2", "--small", "tiny"),
        ("limit", "--classes", "5", "--repeats", "1"),
    ],
    ids=["step", "extrapolated", "complete", "limit"],
)
def test_a_reference_that_computes_something_else_ends_the_run(
    bench: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    place: str,
) -> None:
    right = getattr(ReferenceCoOp, place)
    monkeypatch.setattr(ReferenceCoOp, place, lambda *a: 1.002 * right(*a))
    with pytest.raises(MismatchError, match="differ"):
        bench(*arguments)
