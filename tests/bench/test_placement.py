"""The simulated rounds of `bench placement`."""

from __future__ import annotations

import pytest

from fedprompt.bench.placement import round_seconds

RULES = ("planner", "longest first")


def test_one_worker_needs_the_same_time_whatever_the_rule() -> None:
    planner, longest = (round_seconds(rule, (1.0,), 4, 3, seed=1) for rule in RULES)
    assert planner == pytest.approx(longest)


def test_the_planner_is_faster_where_workers_differ_in_speed() -> None:
    speeds = (1.0, 1.0, 1.0, 0.25)
    planner, longest = (
        sum(round_seconds(rule, speeds, 8, 10, seed) for seed in range(5)) for rule in RULES
    )
    assert planner < 0.95 * longest
