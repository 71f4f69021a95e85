"""Time to accuracy, by hand."""

from __future__ import annotations

import pytest

from fedprompt.errors import UserError
from fedprompt.evaluation.protocols.time_to_accuracy import (
    TimeToAccuracy,
    TimeToAccuracyOptions,
    curve,
    reached,
)
from tests.support.secure_rounds import MakeWorkspace


def line(server_round: int, accuracy: float | None, seconds: float | None) -> dict[str, object]:
    measured = None if accuracy is None else {"accuracy": accuracy}
    clock = {} if seconds is None else {"clock": {"seconds": seconds}}
    return {"round": server_round, "global": measured, **clock}


LINES = [
    line(0, 0.2, None), line(1, 0.6, 3.0), line(2, None, 4.0), line(3, 0.4, 1.5), line(4, 0.6, 2.0)
]  # fmt: skip


def test_seconds_add_up_over_rounds_that_are_not_evaluated() -> None:
    points = curve(LINES, "global", "accuracy")
    assert [(p["round"], p["seconds"]) for p in points] == [(0, 0), (1, 3), (3, 8.5), (4, 10.5)]
    assert curve(LINES, "personal", "mean") == []


@pytest.mark.parametrize(
    ("level", "found"),
    [(0.2, (0, 0.0)), (0.4, (1, 3.0)), (0.5, (4, 10.5)), (0.6, (4, 10.5)), (0.61, (None, None))],
)
def test_an_accuracy_is_reached_when_it_is_kept(
    level: float, found: tuple[int | None, float | None]
) -> None:
    point = reached(curve(LINES, "global", "accuracy"), level)
    assert (point["round"], point["seconds"]) == found


def test_runs_are_compared_by_target() -> None:
    points = curve(LINES, "global", "accuracy")
    marks = [{"target": t, **reached(points, t / 100)} for t in (40.0, 90.0)]
    part = {"curves": {"global": {"points": points, "reached": marks}}}
    table, figure = TimeToAccuracy.compare([("a", part), ("b", part)])
    assert table.columns == ("model", "40 %", "90 %", "whole run", "accuracy")
    assert table.rows[0] == ("a, global", "3.0 s", "-", "10.5 s", "60.0 %")
    assert len(figure.panels[0].curves) == 2


def test_a_run_without_a_clock_is_refused(make_workspace: MakeWorkspace) -> None:
    workspace = make_workspace()
    protocol = TimeToAccuracy(TimeToAccuracyOptions(), workspace.config)
    with pytest.raises(UserError, match=r"clock\.enabled"):
        protocol.open(workspace)
