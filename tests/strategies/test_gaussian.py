"""Gaussian-weighted averaging over rounds: beside training, never in it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedprompt.config.fields import build
from fedprompt.errors import UserError
from fedprompt.federation.registry import strategy_class
from fedprompt.federation.screening import Update
from fedprompt.messages import Arrays
from fedprompt.strategies.fedavg import FedAvg
from fedprompt.strategies.gaussian import Gaussian

Values = NDArray[np.float32]
SHAPES = {"ctx": (2, 3), "visual": (4,)}


def make(rounds: int, **options: Any) -> Gaussian:
    config = build(strategy_class("gaussian").Config, {"name": "gaussian", **options}, "strategy")
    return Gaussian(config, shapes=SHAPES, seed=1, rounds=rounds)


def replies(server_round: int) -> list[Update]:
    """Two clients with 1 and 3 images; other values in every round."""
    draw = np.random.default_rng(server_round)
    return [
        Update(
            client,
            {n: draw.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()},
            examples,
        )
        for client, examples in ((0, 1), (1, 3))
    ]


def run(strategy: Gaussian, first: int, last: int, shared: Arrays) -> list[Arrays]:
    """The shared tensors after each of the rounds `first` .. `last`."""
    history = []
    for server_round in range(first, last + 1):
        shared = strategy.aggregate(server_round, shared, replies(server_round))
        history.append(shared)
    return history


def start() -> Arrays:
    return {n: np.zeros(s, dtype=np.float32) for n, s in SHAPES.items()}


def density(x: float, mean: float, std: float) -> float:
    """As the authors write it."""
    return 1 / (std * math.sqrt(2 * math.pi)) * math.exp(-0.5 * ((x - mean) / std) ** 2)


@pytest.mark.parametrize(
    ("rounds", "options", "mean", "std"),
    [
        (20, {}, 15, 1),
        (50, {"mean": 0.6, "std": 0.6}, 30, 30),
        (50, {"mean": 0.9, "std": 0.1}, 45, 5),
        (20, {"mean": 0.3, "std": 0.5}, 6, 10),
        (3, {}, 2.25, 0.15),
    ],
)
def test_the_end_is_the_papers_weighted_sum(
    rounds: int, options: dict[str, float], mean: float, std: float
) -> None:
    strategy = make(rounds, **options)
    history = run(strategy, 1, rounds, start())
    weights = [density(r, mean, std) for r in range(1, rounds + 1)]
    for name in SHAPES:
        expected = sum(
            w / sum(weights) * prompts[name].astype(np.float64)
            for w, prompts in zip(weights, history, strict=True)
        )
        eval_tensors = strategy.eval_tensors(history[-1])[name]
        assert eval_tensors.dtype == np.float32
        np.testing.assert_allclose(eval_tensors, expected, rtol=1e-5, atol=1e-7)


def test_the_papers_largest_and_last_weight() -> None:
    strategy = make(20)
    logs = [strategy.log_density(r) for r in range(1, 21)]
    weights = np.exp(logs) / np.exp(logs).sum()
    assert weights[14] == pytest.approx(0.399, abs=5e-4)
    assert weights[19] == pytest.approx(1.5e-6, rel=0.02)


def test_training_goes_on_from_fedavg_bit_for_bit() -> None:
    """What clients receive never contains the rounds' mean."""
    ours = run(make(20), 1, 20, start())
    plain = FedAvg(FedAvg.Config(), shapes=SHAPES, seed=1)
    shared = start()
    for server_round, found in enumerate(ours, start=1):
        shared = plain.aggregate(server_round, shared, replies(server_round))
        for name in SHAPES:
            assert np.array_equal(found[name], shared[name])


def test_early_rounds_are_served_whole_though_their_weights_are_tiny() -> None:
    """The unfinished sum of round 1 of 20 would be 1e-43 times its prompts: nearly zero."""
    strategy = make(20)
    first = run(strategy, 1, 1, start())[0]
    for name in SHAPES:
        np.testing.assert_allclose(strategy.eval_tensors(first)[name], first[name], rtol=1e-6)
    assert np.abs(strategy.eval_tensors(first)["ctx"]).max() > 0.1


def test_weights_of_a_long_run_do_not_vanish() -> None:
    """Round 1 of 2,000 at a standard deviation of 0.2 rounds: exp(-28 million) is 0."""
    strategy = make(2000, std=0.0001)
    history = run(strategy, 1, 3, start())
    eval_tensors = strategy.eval_tensors(history[-1])
    for name in SHAPES:
        assert np.isfinite(eval_tensors[name]).all()
        np.testing.assert_allclose(eval_tensors[name], history[-1][name], rtol=1e-6)


def test_before_the_first_round_the_start_is_served() -> None:
    strategy, values = make(20), start()
    assert strategy.eval_tensors(values) is values
    assert strategy.state() == {}
    strategy.load_state({})
    assert strategy.eval_tensors(values) is values


@pytest.mark.parametrize("stop", [1, 12, 15])
def test_a_resumed_run_serves_the_same_bits(stop: int) -> None:
    whole = make(20)
    last = run(whole, 1, 20, start())[-1]
    first, second = make(20), make(20)
    kept = run(first, 1, stop, start())[-1]
    second.load_state({n: a.copy() for n, a in first.state().items()})
    run(second, stop + 1, 20, kept)
    for name in SHAPES:
        assert np.array_equal(whole.eval_tensors(last)[name], second.eval_tensors(last)[name])
    assert all(np.array_equal(a, second.state()[n]) for n, a in whole.state().items())


def test_equal_weights_of_clients_are_fedavgs() -> None:
    strategy = make(5, weights="uniform")
    found = run(strategy, 1, 1, start())[0]
    a, b = (u.arrays["ctx"] for u in replies(1))
    np.testing.assert_allclose(found["ctx"], (a + b) / 2, rtol=1e-6)


@pytest.mark.parametrize("options", [{"std": 0}, {"mean": -0.1}, {"sigma": 1}])
def test_impossible_configs_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UserError):
        make(5, **options)
