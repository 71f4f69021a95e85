"""What each cycle ends with is kept, and the set is bounded."""

from __future__ import annotations

import numpy as np
import pytest

from fedprompt.config.cycles import place_of
from fedprompt.errors import UserError
from fedprompt.messages import Arrays
from fedprompt.strategies.posterior_samples import PosteriorSamples
from tests.support.strategies import full, strategy_of_clients, updates_of

ROUNDS = 7
"""Three cycles of three rounds, of which the last has one."""


def make() -> PosteriorSamples:
    extras = {"samples.known": np.zeros(2, np.float32), "samples.ctx": np.zeros((2, 2), np.float32)}
    found = strategy_of_clients(
        1, "posterior_samples", shapes={"ctx": (2,)}, extras=extras, rounds=ROUNDS
    )
    assert isinstance(found, PosteriorSamples)
    return found


def run(strategy: PosteriorSamples, first: int, last: int) -> None:
    """In every round, the mean of the clients is the round's number."""
    for server_round in range(first, last + 1):
        shared = {"ctx": full(server_round - 1, (2,))}
        new = strategy.aggregate(server_round, shared, updates_of([[server_round] * 2]))
        assert new["ctx"].tolist() == [server_round] * 2


def rows(extras: Arrays) -> list[float | None]:
    known, values = extras["samples.known"], extras["samples.ctx"]
    assert not values[known == 0].any()
    return [float(v[0]) if k else None for k, v in zip(known, values, strict=True)]


def test_a_round_has_a_place_in_its_cycle() -> None:
    places = [place_of(r, ROUNDS, 3) for r in range(1, ROUNDS + 1)]
    assert [(p.cycle, p.position) for p in places] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0),
    ]  # fmt: skip
    assert [p.share for p in places[:3]] == [0, 1 / 3, 2 / 3]
    assert [place_of(r, 2, 3).cycle for r in (1, 2)] == [0, 1]


def test_finished_cycles_are_sent_and_evaluated() -> None:
    strategy = make()
    assert strategy.eval_extras() == {}
    seen = []
    for server_round in range(1, ROUNDS + 1):
        sent = rows(strategy.client_extras(server_round, 0))
        run(strategy, server_round, server_round)
        seen.append((sent, rows(strategy.eval_extras())))
    none, one, both = [None, None], [3.0, None], [3.0, 6.0]
    assert [sent for sent, _ in seen] == [none] * 3 + [one] * 3 + [both]
    assert [evaluated for _, evaluated in seen] == [none] * 3 + [one] * 3 + [both]


def test_a_cycle_that_nobody_answered_leaves_its_row_empty() -> None:
    strategy = make()
    run(strategy, 1, 2)  # Round 3 is void; round 2 is what the cycle ended with.
    run(strategy, 7, 7)
    assert rows(strategy.eval_extras()) == [2.0, None]


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_keeps_its_samples(stop: int) -> None:
    whole, first, second = make(), make(), make()
    run(whole, 1, ROUNDS)
    run(first, 1, stop)
    second.load_state({n: a.copy() for n, a in first.state().items()})
    run(second, stop + 1, ROUNDS)
    assert rows(second.eval_extras()) == rows(whole.eval_extras()) == [3.0, 6.0]


def test_a_method_without_samples_is_refused() -> None:
    with pytest.raises(UserError, match="rebapl"):
        strategy_of_clients(1, "posterior_samples")
