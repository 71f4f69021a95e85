"""Which settings to try next, and which trials to end early: pure functions of earlier trials.

Nothing here has a state of its own. A proposal depends on the plan, its number and the results of
earlier batches only, so a search that was killed proposes the same trials when it is repeated, in
one process or on a cluster.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import optuna

from fedprompt.config.search import Choices, Space
from fedprompt.rng import derive_seed, generator
from fedprompt.tuning.plan import Budget

GRID_POINTS = 5
"""Values of a range in a grid."""
REDUCTION = 3
"""Hyperband: of the trials that reach a rung, one in three goes on."""
TOP = 3
"""Importances compare the best third of the trials with all."""
WARM_UP = 3
"""The median rule begins after a third of the rounds: large steps pay off late."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Trial:
    """A finished trial.

    Attributes:
        values: the settings that were tried, by config key.
        objective: the accuracy on validation images, or None if the run failed.
        by_round: the best objective until each round, from round 1.
        pruned: whether the trial was ended early.
        steps: optimiser steps of all clients.
        seconds: duration of its rounds. Trials are equal whatever they took.
    """

    values: Mapping[str, Any]
    objective: float | None
    by_round: tuple[float, ...] = ()
    pruned: bool = False
    steps: int = 0
    seconds: float = field(default=0.0, compare=False)


def next_batch(earlier: Sequence[Trial], budget: Budget) -> range:
    """The numbers of a row's next trials.

    Args:
        earlier: all trials of the row so far.
        budget: what the row gets.

    Returns:
        The numbers of a batch, or none if the budget is used up.
    """
    first = len(earlier)
    batch = range(first, first + budget.batch)
    if budget.steps is not None:
        costs, limit = [float(trial.steps) for trial in earlier], float(budget.steps)
    elif budget.seconds is not None:
        costs, limit = [trial.seconds for trial in earlier], budget.seconds
    else:
        return range(first, min(first + budget.batch, budget.trials))
    # Trials that fail before their first round cost nothing, so their number has no end.
    stuck = first > 0 and not any(costs[-budget.batch :])
    return range(0) if stuck or sum(costs) >= limit else batch


def propose(
    space: Mapping[str, Space],
    earlier: Sequence[Trial],
    number: int,
    budget: Budget,
    row: str,
    *,
    pending: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any] | None:
    """The settings of a trial.

    Args:
        space: where to look, by config key.
        earlier: the trials of earlier batches, in order.
        number: number of the trial, from 1; trial 0 has the row's own settings.
        budget: sampler and seed.
        row: name of the row, so that rows do not share random numbers.
        pending: the settings of the trial's own batch that were proposed before it, from which TPE
            keeps away.

    Returns:
        Values by config key, or None if a grid has no more points.
    """
    if budget.sampler == "grid":
        points = list(itertools.product(*(_points(s) for s in space.values())))
        order = generator(budget.seed, "tune", row, "grid").permutation(len(points))
        if number > len(points):
            return None
        return dict(zip(space, points[order[number - 1]], strict=True))
    seed = derive_seed(budget.seed, "tune", row, number) % 2**32
    sampler: optuna.samplers.BaseSampler
    if budget.sampler == "random":
        sampler = optuna.samplers.RandomSampler(seed=seed)
    else:
        # A third of the budget is drawn at random before TPE begins to model the results.
        startup = max(budget.batch, budget.trials // 3)
        # The liar takes pending trials for bad ones. Without it, the trials of a batch, which know
        # the same results, are nearly the same trial several times.
        sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=startup, constant_liar=True
        )
    study = study_of(space, earlier, sampler)
    for values in pending:
        if _inside(space, values):
            study.add_trial(
                optuna.trial.create_trial(
                    state=optuna.trial.TrialState.RUNNING,
                    params={key: values[key] for key in space},
                    distributions=_distributions(space),
                )
            )
    return dict(study.ask(_distributions(space)).params)


def study_of(
    space: Mapping[str, Space],
    trials: Sequence[Trial],
    sampler: optuna.samplers.BaseSampler | None = None,
) -> optuna.Study:
    """An Optuna study in memory that holds the trials of a row, without those that failed."""
    study = optuna.create_study(direction="maximize", sampler=sampler)
    distributions = _distributions(space)
    for trial in trials:
        if trial.objective is None or not _inside(space, trial.values):
            continue
        states = optuna.trial.TrialState
        state = states.PRUNED if trial.pruned else states.COMPLETE
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                params={key: trial.values[key] for key in space},
                distributions=distributions,
                value=None if trial.pruned else trial.objective,
                intermediate_values=dict(enumerate(trial.by_round, 1)),
            )
        )
    return study


def thresholds(earlier: Sequence[Trial], number: int, rounds: int, budget: Budget) -> list[float]:
    """The objective that a trial must have reached after each round, or it ends there.

    `median`: the median of the earlier trials after the same round, from round R/3 on. `hyperband`:
    in rounds R/3, R/9, ..., the value that one in three of the earlier trials that came so far
    reached; trials belong in turn to brackets, which begin with different of these rounds (Li et
    al., JMLR 2018).
    Only trials of earlier batches count, so the order in which trials end does not matter.

    Args:
        earlier: the trials of earlier batches.
        number: number of the trial.
        rounds: rounds R of a whole trial.
        budget: the pruner.

    Returns:
        A threshold for each round but the last, 0 where none applies; empty without any.
    """
    whole = [trial for trial in earlier if trial.objective is not None]
    if budget.pruner == "none" or not whole:
        return []
    limits = [0.0] * max(0, rounds - 1)
    if budget.pruner == "median":
        for r in range(max(1, rounds // WARM_UP), rounds):
            values = [t.by_round[r - 1] for t in whole if not t.pruned and len(t.by_round) >= r]
            limits[r - 1] = median(values) if values else 0.0
        return limits
    rungs = sorted({rounds // REDUCTION**k for k in range(1, 20)} - {0})
    for rung in rungs[number % max(1, len(rungs)) :]:
        values = sorted(t.by_round[rung - 1] for t in whole if len(t.by_round) >= rung)
        if len(values) >= REDUCTION:
            limits[rung - 1] = values[math.ceil(len(values) * (1 - 1 / REDUCTION)) - 1]
    return limits


def importances(space: Mapping[str, Space], trials: Sequence[Trial]) -> dict[str, float]:
    """How much each setting matters for being among the best trials (PED-ANOVA).

    Source: PED-ANOVA: Efficiently Quantifying Hyperparameter Importance in Arbitrary Subspaces
    (Watanabe, Bansal, Hutter, IJCAI 2023).

    Args:
        space: the settings that were searched.
        trials: the trials; those that were ended early or failed do not count.

    Returns:
        Shares of 1 by key, largest first; empty with a single setting or too few trials, and if
            so many trials are equal that there is no best third.
    """
    study = study_of(space, [trial for trial in trials if not trial.pruned])
    values = sorted(trial.value or 0.0 for trial in study.trials)
    if len(space) < 2 or len(values) < 4 or values[-math.ceil(len(values) / TOP)] == values[0]:
        return {}
    # Optuna's own choice, the best tenth, is a single one of a dozen trials.
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=1 / TOP)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: float(found[key]) for key in sorted(found, key=lambda key: -found[key])}


def best(trials: Sequence[Trial]) -> int | None:
    """The number of the best trial that was not ended early; the first of equal ones."""
    done = [
        (t.objective, -n) for n, t in enumerate(trials) if t.objective is not None and not t.pruned
    ]
    return -max(done)[1] if done else None


def _inside(space: Mapping[str, Space], values: Mapping[str, Any]) -> bool:
    """Whether settings lie in the space; Optuna refuses others, which a row's own may be."""
    return all(values.get(key) in part for key, part in space.items())


def _distributions(space: Mapping[str, Space]) -> dict[str, optuna.distributions.BaseDistribution]:
    return {
        key: optuna.distributions.CategoricalDistribution(s.values)
        if isinstance(s, Choices)
        else optuna.distributions.FloatDistribution(s.low, s.high, log=s.log)
        for key, s in space.items()
    }


def _points(space: Space) -> Sequence[Any]:
    if isinstance(space, Choices):
        return space.values
    steps = [k / (GRID_POINTS - 1) for k in range(GRID_POINTS)]
    if space.log:
        return [space.low * (space.high / space.low) ** step for step in steps]
    return [space.low + (space.high - space.low) * step for step in steps]
