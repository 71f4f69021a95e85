"""FOCoOp's server: the plan against its conditions and a general solver, 2-means, the exchange."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize

from fedprompt.errors import UserError
from fedprompt.federation.registry import strategy_class
from fedprompt.federation.screening import Update
from strategies.parts.unbalanced import transport, upper_cluster

SHAPES = {"ctx_global": (2, 1, 2), "ctx_ood": (3, 1, 2), "other": (2,)}


def make(**options: float) -> object:
    cls = strategy_class("unbalanced_transport")
    return cls(cls.Config(**options), shapes=SHAPES, seed=1)


def updates(*words: object, examples: tuple[int, ...] = (1, 3)) -> list[Update]:
    draw = np.random.default_rng(0)
    return [
        Update(
            client,
            {
                "ctx_global": draw.standard_normal((2, 1, 2)).astype(np.float32),
                "ctx_ood": np.asarray(one, np.float32).reshape(3, 1, 2),
                "other": np.full(2, client, np.float32),
            },
            number,
        )
        for client, (one, number) in enumerate(zip(words, examples, strict=True))
    ]


def test_the_plan_is_the_one_of_a_general_solver() -> None:
    draw = np.random.default_rng(1)
    x, y = draw.standard_normal((4, 3)), draw.standard_normal((2, 3))
    found = transport(x, y, 0.1, 5000)
    cost = ((x[:, None] - y[None]) ** 2).sum(-1)
    cost /= cost.max()

    def kl(p: np.ndarray, q: float) -> float:
        return float((p * np.log(p / q) - p + q).sum())

    def objective(logs: np.ndarray) -> float:
        plan = np.exp(logs).reshape(4, 2)
        return float((plan * cost).sum()) + 0.1 * (kl(plan.sum(1), 1 / 4) + kl(plan.sum(0), 1 / 2))

    best = minimize(objective, np.log(np.full(8, 1 / 8)), method="L-BFGS-B", tol=1e-14)
    assert objective(np.log(found + 1e-300).ravel()) <= best.fun + 1e-6
    assert found == pytest.approx(np.exp(best.x).reshape(4, 2), abs=2e-3)
    # Conditions of the optimum: no entry can gain by growing, and those above 0 not by shrinking.
    slope = cost + 0.1 * (np.log(found.sum(1) * 4)[:, None] + np.log(found.sum(0) * 2))
    assert slope.min() > -1e-6
    assert slope[found > 1e-6] == pytest.approx(0, abs=1e-4)


def test_points_that_are_far_from_all_targets_send_little() -> None:
    mass = transport(np.array([[0.0, 0], [0.1, 0], [9, 9]]), np.array([[0.0, 0.1]]), 0.1, 1000)
    assert mass[2, 0] < mass[:2, 0].min() / 10


def test_two_means_by_all_divisions() -> None:
    values = np.random.default_rng(2).random(9) ** 3

    def within(upper: np.ndarray) -> float:
        return sum(((v - v.mean()) ** 2).sum() for v in (values[upper], values[~upper]))

    every = [np.array(c) for c in itertools.product([False, True], repeat=9)]
    best = min(within(u) for u in every if u.any() and not u.all())
    found = upper_cluster(values)
    assert within(found) == pytest.approx(best)
    assert values[found].min() > values[~found].max()
    assert not upper_cluster(np.full(4, 0.3)).any()
    assert upper_cluster(np.array([1.0, 2.0, 2.0])).tolist() == [False, True, True]


def test_one_exchange_by_hand() -> None:
    strategy = make(iterations=3000)
    sent = updates([[0, 0], [5, 5], [7, -7]], [[0.1, 0], [6, 6], [8, -8]])
    shared = {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}
    after = strategy.aggregate(1, shared, sent)  # type: ignore[attr-defined]
    mean = (sent[0].arrays["ctx_global"] + 3 * sent[1].arrays["ctx_global"]).reshape(2, 2) / 4
    points = np.concatenate([u.arrays["ctx_ood"] for u in sent]).reshape(6, 2)
    plan = transport(points.astype(float), mean.astype(float), 0.1, 3000)
    like = upper_cluster(plan.sum(1))
    assert like.tolist() == [True, False, False, True, False, False]
    for c in range(2):
        moved = mean[c].astype(float)
        for i in (0, 3):
            moved = moved + 0.5 * 2 * plan[i, c] * (points[i] - mean[c])
        assert after["ctx_global"][c, 0] == pytest.approx(moved, abs=1e-5)
    kept = sorted((1, 2, 4, 5), key=lambda i: plan[i].sum())[:3]
    assert after["ctx_ood"].reshape(3, 2) == pytest.approx(points[kept])
    assert after["other"] == pytest.approx([0.75, 0.75]), "the mean by images"


def test_too_few_words_are_repeated() -> None:
    # Five of six prompts look like classes.
    near = [[0, 0], [0.1, 0], [0, 0.1]]
    sent = updates(near, [[0.1, 0.1], [0, 0], [9, 9]])
    shared = {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}
    after = make().aggregate(1, shared, sent)  # type: ignore[attr-defined]
    assert after["ctx_ood"].reshape(3, 2).tolist() == [[9, 9]] * 3


def test_methods_without_words_are_refused() -> None:
    cls = strategy_class("unbalanced_transport")
    with pytest.raises(UserError, match="ctx_ood"):
        cls(cls.Config(), shapes={"ctx_global": (2, 1, 2)}, seed=1)
    with pytest.raises(UserError, match="shape"):
        cls(cls.Config(), shapes={"ctx_global": (2, 1, 2), "ctx_ood": (3, 4, 2)}, seed=1)
