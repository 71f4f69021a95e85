"""What every strategy must do, whatever it computes; new strategies are included automatically."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from numpy.typing import NDArray
from safetensors.torch import load, save

from fedprompt.data.sections import available
from fedprompt.experiment.compose import compose
from fedprompt.federation.registry import all_strategies, strategy_class
from fedprompt.federation.sampling import Clients
from fedprompt.federation.strategy import SharedPromptStrategy
from fedprompt.messages import Arrays, to_arrays
from tests.support.detectors import DETECTOR
from tests.support.strategies import NODE, answer, send

CLIENTS, ROUNDS = 7, 4
USUAL = {"ctx": (3, 4), "other": (3,)}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "per_class": {"class_shares": (3,), "ctx": (3, 4)},
    "per_expert": {"expert_shares": (2,), "ctx": (3, 4), "w.0": (3,), "w.1": (2, 2)},
    "product_mean": {**USUAL, "q.lora_A": (2, 3, 5), "q.lora_B": (2, 4, 3)},
    "unbalanced_transport": {"ctx_global": (3, 4), "ctx_ood": (5, 4), "ctx": (3, 4)},
    "sabre_fl": {**USUAL, "embeddings": (5, 32)},
    "similar_prototypes": {"ctx": (3, 4), "prototypes": (3, 4)},
    "scaffold": {**USUAL, **{f"control.{n}": s for n, s in USUAL.items()}},
}
EXTRAS: dict[str, Arrays] = {
    "all_peers": {
        "peers.known": np.zeros(CLIENTS, np.float32),
        "peers.ctx": np.zeros((CLIENTS, 3, 4), np.float32),
    },
    "nearest_peers": {
        "peers.known": np.zeros(2, np.float32),
        "peers.ctx": np.zeros((2, 3, 4), np.float32),
    },
    "similar_prototypes": {
        "peers.known": np.zeros(2, np.float32),
        "peers.prototypes": np.zeros((2, 3, 4), np.float32),
    },
    "posterior_samples": {
        "samples.known": np.zeros(2, np.float32),
        "samples.ctx": np.zeros((2, 3, 4), np.float32),
    },
}
OPTIONS: dict[str, dict[str, Any]] = {
    "clustered": {"common_rounds": 1},
    "dp_fedavg": {"clip": 0.2},
    "sabre_fl": {"detector": DETECTOR},
}
"""Where the defaults would leave out what is to be tested."""
NOISY = {"dp_fedavg": {"noise": 0.0}, "flame": {"noise": 0.0}}
"""What takes the noise away from a strategy that adds some."""
OWN_STEP = {
    "fedadam", "fedyogi", "dp_fedavg", "flame", "per_class", "per_expert", "product_mean",
    "sabre_fl", "unbalanced_transport",
}  # fmt: skip
"""Strategies whose step is not the clients' own, even where all of them agree."""
STRATEGIES = sorted(all_strategies())
Replies = list[tuple[Arrays, int]]


def make(name: str, **options: Any) -> SharedPromptStrategy:
    cls = strategy_class(name)
    config = cls.Config(**{"name": name, **OPTIONS.get(name, {}), **options})
    strategy = cls(config, shapes=shapes_of(name), seed=1, rounds=ROUNDS, extras=EXTRAS.get(name))
    strategy.set_nodes({c: NODE + c for c in range(CLIENTS)})
    return strategy


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    return SHAPES.get(name, USUAL)


def start(name: str) -> dict[str, NDArray[np.float32]]:
    draw = np.random.default_rng(5)
    return {n: draw.random(s).astype(np.float32) for n, s in shapes_of(name).items()}


def replies_of(name: str, server_round: int) -> Replies:
    """Clients with different prompts and different numbers of images."""
    draw = np.random.default_rng(server_round)
    return [
        (
            {n: draw.random(s).astype(np.float32) for n, s in shapes_of(name).items()},
            int(draw.integers(1, 50)),
        )
        for _ in range(CLIENTS)
    ]


def one_round(
    strategy: SharedPromptStrategy,
    shared: Mapping[str, NDArray[Any]],
    server_round: int,
    replies: Replies,
    order: Iterable[int] = range(CLIENTS),
) -> Arrays | None:
    messages = send(strategy, shared, server_round)
    sent: list[Message] = [answer(messages[k], *replies[k]) for k in order]
    arrays, _ = strategy.aggregate_train(server_round, sent)
    return None if arrays is None else to_arrays(arrays)


def run(strategy: SharedPromptStrategy, name: str, first: int, shared: Arrays) -> list[Arrays]:
    """The shared tensors after every round from `first` on."""
    after = []
    for server_round in range(first, ROUNDS + 1):
        new = one_round(strategy, shared, server_round, replies_of(name, server_round))
        assert new is not None
        after.append(new)
        shared = new
    return after


def bits(tensors: Mapping[str, NDArray[Any]]) -> dict[str, bytes]:
    return {n: a.tobytes() for n, a in tensors.items()}


def through_a_checkpoint(strategy: SharedPromptStrategy) -> Arrays:
    """The state as a run folder keeps it."""
    state = {n: torch.from_numpy(np.asarray(a)) for n, a in strategy.state().items()}
    return {n: t.numpy() for n, t in load(save(state)).items()}


@pytest.fixture(params=STRATEGIES)
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "dp_fedavg":
        pytest.importorskip("dp_accounting", reason="needs the extra 'dp'")
    return str(request.param)


def test_shapes_types_and_finiteness(name: str) -> None:
    for shared in run(make(name), name, 1, start(name)):
        assert {n: a.shape for n, a in shared.items()} == shapes_of(name)
        assert all(a.dtype == np.float32 and np.isfinite(a).all() for a in shared.values())


def test_the_prompts_move(name: str) -> None:
    before = start(name)
    after = run(make(name), name, 1, before)[-1]
    assert not np.array_equal(after["ctx"], before["ctx"])


def test_the_order_of_replies_changes_no_bit(name: str) -> None:
    key = make(name).state()
    results = []
    for order in (range(CLIENTS), reversed(range(CLIENTS)), [3, 0, 6, 1, 5, 2, 4]):
        strategy, shared, asked = make(name), start(name), list(order)
        strategy.load_state({n: a.copy() for n, a in key.items()})
        for server_round in range(1, ROUNDS + 1):
            replies = replies_of(name, server_round)
            shared = one_round(strategy, shared, server_round, replies, asked) or {}
        results.append(bits(shared))
    assert results[0] == results[1] == results[2]


def test_sums_that_cancel_do_not_depend_on_the_order_either(name: str) -> None:
    # In another order, such sums end in other bits, float64 or not.
    numbers = (1e17, 3.7, -1e17, 0.1, 7e9, -7e9, 1e-3)
    replies: Replies = [
        ({n: np.full(s, x, np.float32) for n, s in shapes_of(name).items()}, 1) for x in numbers
    ]
    key = make(name).state()
    results = []
    for order in (range(CLIENTS), reversed(range(CLIENTS)), [4, 0, 2, 6, 1, 3, 5]):
        strategy = make(name, max_norm=1e30)
        strategy.load_state({n: a.copy() for n, a in key.items()})
        after = one_round(strategy, start(name), 1, replies, order)
        assert after is not None
        results.append(bits(after))
    assert results[0] == results[1] == results[2]


def test_clients_are_interchangeable(name: str) -> None:
    options = NOISY.get(name, {})
    one, two = make(name, **options), make(name, **options)
    order = [2, 5, 0, 6, 1, 4, 3]
    shared = {id(one): start(name), id(two): start(name)}
    for server_round in range(1, ROUNDS + 1):
        replies = replies_of(name, server_round)
        permuted = [replies[k] for k in order]
        shared[id(one)] = one_round(one, shared[id(one)], server_round, replies) or {}
        shared[id(two)] = one_round(two, shared[id(two)], server_round, permuted) or {}
        for tensor, values in shared[id(one)].items():
            np.testing.assert_allclose(shared[id(two)][tensor], values, rtol=1e-5, atol=1e-6)


def test_one_client_is_enough(name: str) -> None:
    strategy = make(name)
    strategy.set_nodes({3: NODE + 3})
    messages = send(strategy, start(name))
    arrays, _ = strategy.aggregate_train(1, [answer(messages[0], *replies_of(name, 1)[0])])
    assert arrays is not None
    assert {n: a.shape for n, a in to_arrays(arrays).items()} == shapes_of(name)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 0.0])
def test_when_all_agree_the_prompts_are_theirs(name: str, scale: float) -> None:
    if name in OWN_STEP:
        pytest.skip("its step is its own")
    before = {n: a * np.float32(scale) for n, a in start(name).items()}
    theirs = {n: (a * np.float32(1.5)) for n, a in before.items()}
    after = one_round(make(name), before, 1, [(theirs, k + 1) for k in range(CLIENTS)])
    assert after is not None
    if name == "scaffold":  # control variates move by differences, not to values
        theirs = {n: a for n, a in theirs.items() if not n.startswith("control.")}
    for tensor, values in theirs.items():
        np.testing.assert_allclose(after[tensor], values, rtol=1e-5, atol=1e-35)


def test_a_bad_reply_counts_as_none(name: str) -> None:
    before, replies = start(name), replies_of(name, 1)
    key = make(name).state()
    results = []
    broken = {n: np.full_like(a, np.nan) for n, a in before.items()}
    flat = {n: a.ravel()[:1] for n, a in before.items()}
    for bad in (None, broken, flat, {**before, "more": before["ctx"]}):
        strategy = make(name)
        strategy.load_state({n: a.copy() for n, a in key.items()})
        messages = send(strategy, before)
        sent = [answer(m, *replies[k]) for k, m in enumerate(messages) if k != 4]
        if bad is not None:
            sent.insert(0, answer(messages[4], bad, 3))
        arrays, _ = strategy.aggregate_train(1, sent)
        assert arrays is not None
        assert list(strategy.rejected) == [4]
        results.append(bits(to_arrays(arrays)))
    assert all(r == results[0] for r in results[1:])


def test_a_round_of_bad_replies_changes_nothing(name: str) -> None:
    strategy, before = make(name), start(name)
    broken = {n: np.full_like(a, np.nan) for n, a in before.items()}
    for server_round in (1, 2):
        after = one_round(strategy, before, server_round, [(broken, 1)] * CLIENTS)
        assert sorted(strategy.rejected) == list(range(CLIENTS))
        if strategy.steps_without_replies:
            assert bits(strategy.shared) != bits(before), "noise is sent whoever has replied"
        else:
            assert after is None
            assert bits(strategy.shared) == bits(before), "the server keeps what it has"
    assert one_round(strategy, before, 3, replies_of(name, 3)) is not None
    assert strategy.rejected == {}, "each round is judged anew"


def test_a_method_that_shares_nothing_works(name: str) -> None:
    cls = strategy_class(name)
    options = {"name": name, **OPTIONS.get(name, {})}
    strategy = cls(cls.Config(**options), shapes={}, seed=1, rounds=ROUNDS)
    strategy.set_nodes({0: NODE, 1: NODE + 1})
    for server_round in range(1, ROUNDS + 1):
        messages = send(strategy, {}, server_round)
        arrays, metrics = strategy.aggregate_train(
            server_round, [answer(m, {}, 5) for m in messages]
        )
        assert arrays is not None
        assert dict(arrays) == {}
        assert metrics is not None
        assert metrics["accepted"] == 2


def test_a_resumed_run_goes_on_bit_for_bit(name: str) -> None:
    strategy = make(name)
    shared, kept = start(name), []
    for server_round in range(1, ROUNDS + 1):
        kept.append((shared, through_a_checkpoint(strategy)))
        shared = one_round(strategy, shared, server_round, replies_of(name, server_round)) or {}
    eval_tensors = bits(strategy.eval_tensors(shared))
    for finished, (then, state) in enumerate(kept):
        resumed = make(name)
        resumed.load_state(state)
        last = run(resumed, name, finished + 1, then)[-1]
        assert bits(last) == bits(shared), f"resumed after round {finished}"
        assert bits(resumed.eval_tensors(last)) == eval_tensors
        assert resumed.metrics() == strategy.metrics()


def test_a_strategy_says_whether_it_remembers_clients(name: str) -> None:
    """The same replies by other clients leave another state if, and only if, it does."""
    states, before = [], through_a_checkpoint(make(name))
    for first in (0, 100):
        strategy = make(name)
        strategy.load_state(before)
        strategy.set_nodes({first + c: NODE + c for c in range(CLIENTS)})
        run(strategy, name, 1, start(name))
        single = {f"{c}/{n}": a for c, t in strategy.changed_client_states() for n, a in t.items()}
        states.append(bits({**strategy.state(), **single}))
    assert (states[0] != states[1]) == strategy.remembers_clients


def test_nothing_that_was_given_is_changed(name: str) -> None:
    strategy, before = make(name), start(name)
    for server_round in (1, 2, 3):
        replies = replies_of(name, server_round)
        shared, copy = start(name), [bits(a) for a, _ in replies]
        updates_before = bits(shared)
        one_round(strategy, shared, server_round, replies)
        assert bits(shared) == updates_before == bits(before)
        assert [bits(a) for a, _ in replies] == copy


def test_a_round_without_replies_leaves_the_state(name: str) -> None:
    strategy = make(name)
    run(strategy, name, 1, start(name))
    state = bits(strategy.state())
    messages = send(strategy, start(name), ROUNDS + 1)
    arrays, _ = strategy.aggregate_train(ROUNDS + 1, [])
    assert len(strategy.rejected) == len(messages) == CLIENTS
    if strategy.steps_without_replies:
        assert arrays is not None
        assert bits(strategy.state()) != state, "a release without replies is counted"
    else:
        assert arrays is None
        assert bits(strategy.state()) == state


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_has_a_config_and_says_where_it_is_from(name: str) -> None:
    cls = strategy_class(name)
    assert cls.name == cls.Config().name == name
    assert cls.__module__ == f"fedprompt.strategies.{name}"
    assert cls.__doc__
    assert name in available("strategy")
    text = importlib.import_module(f"fedprompt.strategies.{name}").__doc__ or ""
    assert any(word in text for word in ("Source", "ours")), "cite the paper, or say it is ours"
    if name in ("fedavg", "fedadam", "median"):
        assert compose("quickstart", [f"strategy={name}"]).strategy.name == name


def test_a_round_without_anybody_changes_nothing(name: str) -> None:
    strategy, resumed = make(name), make(name)
    shared = one_round(strategy, start(name), 1, replies_of(name, 1))
    assert shared is not None
    strategy.metrics()
    resumed.load_state(through_a_checkpoint(strategy))
    for one in (strategy, resumed):
        one.known = Clients(one.known.node_of_client, one.known.trainable, present=[])
        assert not send(one, shared, 2)
        arrays, _ = one.aggregate_train(2, [])
        assert arrays is None or bits(to_arrays(arrays)) == bits(shared)
    assert strategy.metrics() == resumed.metrics()
