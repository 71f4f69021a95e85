"""Communication, by hand and in a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedprompt.evaluation.protocols.communication import curve, reached
from tests.support.protocol_runs import (
    summary_of,
)


def test_communication_by_hand() -> None:
    accuracy = [0.2, 0.91, 0.5, None, 0.96, 1.0]
    lines = [
        {
            "round": r,
            "bytes_up": 10 if r else 0,
            "bytes_down": 20 if r else 0,
            "global": None if a is None else {"accuracy": a},
        }
        for r, a in enumerate(accuracy)
    ]
    points = curve(lines, "global", "accuracy")
    assert [p[0] for p in points] == [0, 1, 2, 4, 5]
    # Round 1 reaches 90 %, but round 2 falls below it again.
    assert reached(points, 0.9) == {"round": 4, "accuracy": 0.96, "up": 40, "down": 80}
    assert reached(points, 0.99)["round"] == 5
    assert reached(points, 1.0)["round"] == 5
    assert reached(points, 0.1) == {"round": 0, "accuracy": 0.2, "up": 0, "down": 0}


def test_communication_of_a_run_adds_up_to_its_traffic(runs: Callable[..., Path]) -> None:
    summary = summary_of(runs("communication"))
    last = summary["protocols"]["communication"]["curves"]["personal"]["points"][-1]
    assert (last["up"], last["down"]) == (summary["bytes_up"], summary["bytes_down"])
    assert last["accuracy"] == summary["personal"]["mean"]
