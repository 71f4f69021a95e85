"""Proposals and thresholds are functions of the plan and of earlier trials only."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest

from fedprompt.config.search import Choices, Range, space_from
from fedprompt.errors import UserError
from fedprompt.tuning.plan import Budget
from fedprompt.tuning.proposals import Trial, best, importances, next_batch, propose, thresholds

SPACE = {"training.lr": Range(1e-3, 0.5, log=True), "method.tokens": Choices((4, 16))}


def trial(lr: float, objective: float | None, **changes: Any) -> Trial:
    by_round = () if objective is None else (objective / 2, objective)
    made = Trial({"training.lr": lr, "method.tokens": 4}, objective, by_round)
    return replace(made, **changes)


EARLIER = [trial(0.002, 0.4), trial(0.3, 0.1), trial(0.02, 0.7), trial(0.1, None)]


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_proposals_are_repeatable_inside_the_space_and_different(sampler: Any) -> None:
    budget = Budget(trials=12, sampler=sampler)
    values = [propose(SPACE, EARLIER, n, budget, "row") for n in range(1, 9)]
    assert values == [propose(SPACE, EARLIER, n, budget, "row") for n in range(1, 9)]
    for proposed in values:
        assert proposed is not None
        assert all(proposed[key] in space for key, space in SPACE.items())
    assert len({tuple(v.values()) for v in values if v}) == 8
    assert values[0] != propose(SPACE, EARLIER, 1, budget, "another row")
    assert values[0] != propose(SPACE, EARLIER, 1, replace(budget, seed=2), "row")


def test_every_kind_of_budget_ends() -> None:
    def numbers(budget: Budget, *costs: int) -> list[int]:
        earlier = [trial(0.1, 0.5, steps=c, seconds=float(c)) for c in costs]
        return [*next_batch(earlier, budget)]

    counted = Budget(trials=5, batch=2)
    assert [numbers(counted, *[9] * n) for n in (0, 2, 4, 5)] == [[0, 1], [2, 3], [4], []]
    for budget in (Budget(batch=2, steps=30), Budget(batch=2, seconds=30)):
        assert numbers(budget) == [0, 1]
        assert numbers(budget, 10, 10) == [2, 3]
        assert numbers(budget, 10, 10, 5, 4) == [4, 5]
        assert numbers(budget, 10, 10, 5, 5) == []
        # Trials that fail at once would never use up a budget.
        assert numbers(budget, 10, 10, 0, 0) == []


def test_a_grid_ends() -> None:
    budget = Budget(sampler="grid")
    points = [propose(SPACE, [], n, budget, "row") for n in range(1, 12)]
    assert points[10] is None
    assert len({tuple(p.values()) for p in points[:10] if p}) == 10


def test_tpe_moves_towards_good_trials() -> None:
    """Twelve trials whose objective has one peak, at a learning rate of 0.1."""
    exponents = [-3 + 2.5 * i / 11 for i in range(12)]
    earlier = [trial(10**e, 0.9 - abs(e + 1) / 3) for e in exponents]

    def near(sampler: Any) -> int:
        budget = Budget(trials=12, sampler=sampler)
        tried = [propose(SPACE, earlier, n, budget, "r") for n in range(13, 33)]
        return sum(0.05 < values["training.lr"] < 0.2 for values in tried if values)

    assert near("tpe") > 1.5 * near("random") > 0


def test_the_trials_of_a_batch_keep_away_from_each_other() -> None:
    """A batch of four, after five trials of which those near a learning rate of 0.02 are best."""
    rates = (0.002, 0.01, 0.02, 0.03, 0.3)
    earlier = [trial(lr, 0.7 - abs(math.log10(lr / 0.02)) / 4) for lr in rates]
    budget = Budget(trials=12)

    def spread(*, together: bool) -> float:
        pending: list[Any] = []
        for n in range(4, 8):
            values = propose(SPACE, earlier, n, budget, "r", pending=pending if together else ())
            assert values is not None
            pending.append(values)
        rates = sorted(math.log10(values["training.lr"]) for values in pending)
        return min(b - a for a, b in itertools.pairwise(rates))

    assert spread(together=True) > 2 * spread(together=False)


def test_own_settings_outside_of_the_space_do_no_harm() -> None:
    outside = trial(5.0, 0.99)
    assert propose(SPACE, [outside], 4, Budget(), "r") == propose(SPACE, [], 4, Budget(), "r")
    assert best([outside, trial(0.1, 0.5)]) == 0


def test_median() -> None:
    earlier = [trial(0.1, v) for v in (0.2, 0.6, 0.8)] + [trial(0.1, 0.9, pruned=True)]
    assert thresholds(earlier, 4, 2, Budget(pruner="median")) == [0.3]
    assert thresholds([], 0, 2, Budget(pruner="median")) == []
    # Large steps pay off late: no trial ends in the first third of the rounds.
    long = [Trial({}, 0.5, (0.5,) * 9)]
    assert thresholds(long, 4, 9, Budget(pruner="median")) == [0, 0, *[0.5] * 6]
    assert thresholds(earlier, 4, 2, Budget(pruner="none")) == []


def test_hyperband_keeps_one_in_three() -> None:
    rounds = tuple(float(r) for r in range(1, 10))
    earlier = [
        Trial({}, v, tuple(v * r for r in rounds)) for v in (0.01, 0.02, 0.03, 0.04, 0.05, 0.06)
    ]
    limits = [thresholds(earlier, n, 9, Budget(pruner="hyperband")) for n in (0, 1)]
    # Rungs are rounds 1 and 3; the second bracket begins with the later one.
    assert limits[0] == pytest.approx([0.04, 0, 0.12, 0, 0, 0, 0, 0])
    assert limits[1] == pytest.approx([0, 0, 0.12, 0, 0, 0, 0, 0])
    assert sum(trial.by_round[2] > limits[0][2] for trial in earlier) == 2


def test_the_best_is_a_whole_trial() -> None:
    assert best(EARLIER) == 2
    assert best([trial(0.1, 0.5), trial(0.2, 0.5)]) == 0
    assert best([trial(0.1, 0.9, pruned=True), trial(0.2, 0.1)]) == 1
    assert best([trial(0.1, None)]) is None


def test_importances_sum_to_one() -> None:
    trials = [trial(10**-k, 1 - k / 10) for k in range(1, 4)]
    trials += [replace(t, values={**t.values, "method.tokens": 16}) for t in trials]
    assert sum(importances(SPACE, trials).values()) == pytest.approx(1)
    assert importances(SPACE, trials[:2]) == {}
    # The best third would be all trials.
    alike = [replace(t, objective=0.5) for t in trials[1:]]
    assert importances(SPACE, [trials[0], *alike]) == {}


def test_the_setting_that_matters_is_the_most_important_of_a_dozen_trials() -> None:
    space = {**SPACE, "method.weight": Range(0, 1)}
    budget = Budget(sampler="random")
    tried = [propose(space, [], n, budget, "row") or {} for n in range(1, 13)]
    trials = [Trial(v, 1 - abs(math.log10(v["training.lr"]) + 1.5)) for v in tried]
    shares = importances(space, trials)
    assert next(iter(shares)) == "training.lr"
    assert shares["training.lr"] > 0.5


@pytest.mark.parametrize(
    "value",
    [[1], [1, 1], "x", {"low": 1}, {"low": 2, "high": 1}, {"low": 0, "high": 1, "log": True},
     {"low": 0, "high": 1, "step": 1}, {"low": "a", "high": 1}, {"low": 0, "high": float("inf")}],
)  # fmt: skip
def test_an_impossible_space_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"training\.lr"):
        space_from("training.lr", value)
