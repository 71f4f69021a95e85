"""Costs, and which block starts where: no Ray, no clock."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from fedprompt.simulation.placement import Costs, next_start, remaining


def simulate(works: list[float], speeds: Mapping[str, float]) -> tuple[float, list[str]]:
    """Time until all is done with exactly known speeds (units per second), and who did what."""
    waiting = sorted(works, reverse=True)
    ends: dict[str, float] = {}
    now, who = 0.0, []
    while waiting or ends:
        free = [w for w in speeds if w not in ends]
        busy = {w: end - now for w, end in ends.items()}
        plan = next_start(waiting, free, busy, lambda w, u: u / speeds[str(w)])
        if waiting and plan is not None:
            units, worker = waiting.pop(plan[0]), str(plan[1])
            ends[worker] = now + units / speeds[worker]
            who.append(worker)
            continue
        first = min(ends, key=lambda w: ends[w])
        now = ends.pop(first)
    return now, who


def test_longest_first_fills_two_equal_workers() -> None:
    assert simulate([5, 4, 3, 3, 3], {"a": 1, "b": 1})[0] == 10  # the optimum is 9
    assert simulate([6, 3, 3], {"a": 1, "b": 1})[0] == 6


def test_the_last_long_block_waits_for_the_faster_worker() -> None:
    """Two blocks of 4 s on the fast worker, 40 s on the slow one: both go to the fast one."""
    end, who = simulate([4, 4], {"slow": 0.1, "fast": 1})
    assert (end, who) == (8, ["fast", "fast"])


def test_a_slow_worker_takes_what_it_finishes_in_time() -> None:
    end, who = simulate([4, 4, 4, 1], {"slow": 0.1, "fast": 1})
    assert end == 12
    assert sorted(who) == ["fast", "fast", "fast", "slow"]


def test_speeds_as_measured_beat_dealing_in_turn() -> None:
    """Against a list scheduler that gives every free worker the next block, over many draws."""

    def in_turn(works: list[float], speeds: Mapping[str, float]) -> float:
        ends = dict.fromkeys(speeds, 0.0)
        for units in works:
            worker = min(ends, key=lambda w: ends[w])
            ends[worker] += units / speeds[worker]
        return max(ends.values())

    draw = random.Random(0)
    ours = theirs = 0.0
    for _ in range(200):
        works = [draw.uniform(1, 20) for _ in range(draw.randint(1, 12))]
        speeds = {"a": 1.0, "b": draw.uniform(0.2, 1.0), "c": draw.uniform(0.2, 1.0)}
        end, who = simulate(works, speeds)
        bound = max(sum(works) / sum(speeds.values()), max(works) / max(speeds.values()))
        assert len(who) == len(works)
        assert end <= 2 * bound + 1e-9
        ours, theirs = ours + end, theirs + in_turn(works, speeds)
    assert ours < 0.9 * theirs


def test_without_a_free_worker_nothing_starts() -> None:
    assert next_start([1.0], [], {"a": 1.0}, lambda _, u: u) is None
    assert next_start([], ["a"], {}, lambda _, u: u) is None


def test_a_late_block_is_not_waited_for() -> None:
    """It may take as long again: after some time the slow worker starts the next one."""
    assert remaining(10, 4) == 6
    assert remaining(10, 50) == 50

    def plan(elapsed: float) -> object:
        busy = {"fast": remaining(1, elapsed)}
        return next_start([1.0], ["slow"], busy, lambda w, u: u * (8 if w == "slow" else 1))

    assert plan(0.5) is None
    assert plan(6) is None
    assert plan(8) == (0, "slow")


def test_costs_are_moving_averages_by_kind_and_worker() -> None:
    costs = Costs()
    assert costs.seconds("train", "a", 5) == 5  # nothing measured: units, the same for all
    costs.record("train", "a", 10, 20)
    assert costs.seconds("train", "a", 5) == 10
    costs.record("train", "a", 10, 30)
    assert costs.seconds("train", "a", 1) == pytest.approx(2.3)
    costs.record("train", "b", 10, 5)
    assert costs.seconds("train", "b", 1) == 0.5
    assert costs.seconds("train", "new", 1) == pytest.approx((2.3 + 0.5) / 2)
    assert costs.seconds("evaluate", "a", 1) == 1


def test_a_replaced_worker_is_measured_anew() -> None:
    costs = Costs()
    costs.record("train", "a", 1, 9)
    costs.record("train", "b", 1, 1)
    costs.forget("a")
    assert costs.seconds("train", "a", 1) == 1
