"""Secure aggregation: FedAvg's result within the derived bound, and nothing single to be seen."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedprompt.config.schema import Config, SecureAggregationConfig, to_yaml
from fedprompt.errors import UserError
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import resume, run
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.federation.server_app import Federation
from fedprompt.messages import client_of, from_wire, to_arrays, to_wire
from fedprompt.privacy.secure_aggregation import (
    COLLECT,
    RECORD,
    SETUP,
    SHARE_KEYS,
    STAGE,
    UNMASK,
    flower,
    stage_of,
)
from fedprompt.privacy.secure_aggregation.masks import mask, stream
from fedprompt.privacy.secure_aggregation.params import MODULUS, Terms
from fedprompt.privacy.secure_aggregation.vector import LARGEST_LOSS, decode, encode
from fedprompt.simulation.grids import open_grid
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.workspace import Workspace
from tests.support.builders import small_config
from tests.support.grids import private_tensors


def error_bound(clip: float, levels: int, mean_weight: float) -> float:
    """Largest error of a number of the mean change, as derived in vector.py."""
    return 3 * clip / (levels * mean_weight)


MakeWorkspace = Callable[..., Workspace]
STAGES = (SETUP, SHARE_KEYS, COLLECT, UNMASK)
PROMPTFL = {"name": "promptfl", "context_tokens": 2}
ON = {"enabled": True, "max_weight": 100}


@pytest.fixture
def make_workspace(make_workspace: MakeWorkspace) -> MakeWorkspace:
    """One small step per client: no change exceeds the clip."""
    training = {"lr": 0.02, "batch_size": 64}
    return lambda **sections: make_workspace(**{"training": training, **sections})


class Watched(InlineGrid):
    """Keeps every message of training; hooks change what is sent and what comes back."""

    def __init__(self, workspace: Workspace, **options: Any) -> None:
        super().__init__(workspace, **options)
        self.sent: list[Message] = []
        self.got: list[Message] = []
        self.tamper: Callable[[str | None, Message], Message | None] = lambda stage, m: m
        self.spoil: Callable[[str | None, Message], Message | None] = lambda stage, m: m

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        sent = list(messages)
        stage = stage_of(sent[0])
        # Across the wire: nothing is shared by reference.
        passed = [self.tamper(stage, from_wire(to_wire(m))) for m in sent]
        replies = super().send_and_receive([m for m in passed if m is not None], timeout=timeout)
        kept = [self.spoil(stage, r) for r in replies]
        self.sent += sent
        self.got += [r for r in kept if r is not None]
        return [r for r in kept if r is not None]


def federation_of(workspace: Workspace) -> tuple[Federation, Watched]:
    grid = Watched(workspace)
    federation = Federation(workspace, grid)
    federation.join()
    return federation, grid


def values(federation: Federation) -> Any:
    return federation.shared["ctx"].double().numpy()


def one_round(workspace: Workspace) -> tuple[Any, dict[str, Any]]:
    federation, _ = federation_of(workspace)
    line = federation.train_round(1)
    return values(federation), line


def bound_for(workspace: Workspace, sampled: int, counted: Sequence[int] | None = None) -> float:
    """The derived bound, and half a last place of float32 for each of two results."""
    settings = workspace.config.secure_aggregation
    counted = range(workspace.num_clients) if counted is None else counted
    weight = np.mean([len(workspace.partition.train(c)) / settings.max_weight for c in counted])
    bound = error_bound(settings.clip, Terms.of(settings, sampled).levels, float(weight))
    assert bound < 1e-6
    return bound + float(np.finfo(np.float32).eps)  # all prompts are below 1 in size


def fedavg_of(workspace: Workspace, counted: Iterable[int]) -> Any:
    """The plain mean of some clients' tensors after round 1, in float64."""
    config = workspace.config
    plain = make_plain(workspace)
    federation, grid = federation_of(plain)
    federation.train_round(1)
    by_client = {client_of(r.metadata.src_node_id): r for r in grid.got}
    arrays = {c: to_arrays(by_client[c].content["arrays"])["ctx"] for c in counted}  # type: ignore[arg-type]
    images = {c: len(workspace.partition.train(c)) for c in counted}
    assert config.strategy.name == "fedavg"
    return sum(images[c] * a.astype(np.float64) for c, a in arrays.items()) / sum(images.values())


def make_plain(workspace: Workspace) -> Workspace:
    config = replace(workspace.config, secure_aggregation=SecureAggregationConfig())
    return Workspace(
        config, workspace.clip, workspace.dataset, workspace.partition, workspace.views
    )


# The vector


def test_the_vector_and_its_sum_by_hand() -> None:
    received = {"b": np.zeros(1, np.float32), "a": np.ones(2, np.float32)}
    trained = {"b": np.full(1, -3, np.float32), "a": np.array([1.25, 0.5], np.float32)}
    vector, cut = encode(received, trained, weight=0.5, loss=10.0, clip=2.0, levels=2**20)
    # Names in order, w Delta / c with -3 cut to -2; w, cut, w loss / 100.
    np.testing.assert_allclose(
        vector, [0.0625, -0.125, -0.5, 0.5, 1.0, 0.05], rtol=0, atol=1 / 2**20
    )
    assert cut
    assert ((vector * 2**19) % 1 == 0).all(), "multiples of 2 / levels"
    other, cut = encode(received, received, weight=1.0, loss=float("nan"), clip=2.0, levels=2**20)
    assert not cut
    found = decode(vector + other, received, 2.0)
    np.testing.assert_allclose(found.change["a"], [0.125 / 1.5, -0.25 / 1.5], atol=1e-5)
    np.testing.assert_allclose(found.change["b"], [-1 / 1.5], atol=1e-5)
    assert found.loss == pytest.approx((0.5 * 10 + LARGEST_LOSS) / 1.5, abs=1e-3)
    assert found.cut == 1
    broken = {**trained, "b": np.full(1, np.nan, np.float32)}
    with pytest.raises(UserError, match="not finite"):
        encode(received, broken, weight=1.0, loss=0.0, clip=1.0, levels=2**20)


@pytest.mark.parametrize("clients", [3, 4, 10, 100, 1000, 4096])
def test_sums_stay_below_the_modulus(clients: int) -> None:
    terms = Terms.of(SecureAggregationConfig(), clients)
    assert clients * terms.levels < MODULUS
    assert terms.levels == 2**30 or 2 * clients * terms.levels >= MODULUS, "no finer is possible"
    assert 2 * terms.threshold > terms.shares == clients


def test_the_threshold_is_more_than_half_of_the_shares() -> None:
    for share in (0.5001, 0.6, 2 / 3, 1.0):
        for clients in range(3, 40):
            terms = Terms.of(SecureAggregationConfig(threshold=share, shares=7), clients)
            assert terms.shares == min(7, clients)
            assert terms.shares / 2 < terms.threshold <= terms.shares


# Masks


def test_flowers_masks_have_few_seeds_and_ours_all_bits() -> None:
    """Secrets that agree in Flower's 32 bits of XOR give its mask again, but not ours."""
    one = bytes(range(32))
    other = one[4:8] + one[:4] + one[8:]
    first, second = (flower.pseudo_rand_gen(s, MODULUS, [(8,)])[0] for s in (one, other))
    assert (first == second).all()
    assert (stream(one, 8) != stream(other, 8)).any()
    assert (mask(one, 9) != mask(other, 9)).any()
    assert (stream(one, 8) == stream(one, 9)[:8]).all()
    spread = np.bincount(stream(one, 2**16).view(np.uint8), minlength=256)
    assert np.abs(spread - 1024).max() < 6 * 32, "bytes are even: standard deviation 32"


# The result


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "fedavg"},
        {"name": "fedavg", "weights": "uniform"},
        {"name": "fedavgm", "lr": 1.0},
        {"name": "gaussian"},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_the_result_is_the_plain_one_within_the_bound(
    make_workspace: MakeWorkspace, strategy: dict[str, Any]
) -> None:
    masked = make_workspace(method=PROMPTFL, strategy=strategy, secure_aggregation=ON)
    plain = make_plain(masked)
    (theirs, line), (ours, secure) = one_round(plain), one_round(masked)
    start = federation_of(plain)[0]
    bound = bound_for(masked, 4)
    assert np.abs(theirs - values(start)).max() > 1000 * bound, "training moves the prompts"
    assert np.abs(ours - theirs).max() <= bound
    if strategy == {"name": "fedavg"}:
        assert np.abs(secure["train"]["loss"] - line["train"]["loss"]) <= LARGEST_LOSS * bound
    assert secure["clients"] == line["clients"] == {"sampled": 4, "accepted": 4, "rejected": 0}
    assert secure["secure"] == {"clipped": 0}
    assert set(secure["train"]) == {"loss"}


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
def test_adaptive_rules_take_the_mean(make_workspace: MakeWorkspace, name: str) -> None:
    masked = make_workspace(method=PROMPTFL, strategy={"name": name}, secure_aggregation=ON)
    settings = masked.config.strategy
    # A step is lr (1 - beta_1) Delta / (sqrt(v) + tau) with sqrt(v) >= sqrt(beta_2) tau, and its
    # slope in Delta is at most lr (1 - beta_1) / (sqrt(beta_2) tau + tau).
    slope = settings.lr * (1 - settings.beta_1) / (settings.tau * (1 + settings.beta_2**0.5))
    gap = np.abs(one_round(masked)[0] - one_round(make_plain(masked))[0]).max()
    assert gap <= bound_for(masked, 4) * max(1.0, slope)


def test_two_runs_end_in_the_same_bits(make_workspace: MakeWorkspace) -> None:
    outcomes = []
    for _ in range(2):
        federation, _ = federation_of(make_workspace(method=PROMPTFL, secure_aggregation=ON))
        lines = [federation.train_round(r) for r in (1, 2)]
        outcomes.append((values(federation).tobytes(), lines))
    assert outcomes[0] == outcomes[1]


def test_private_prompts_are_those_of_the_plain_run(make_workspace: MakeWorkspace) -> None:
    masked = make_workspace(secure_aggregation=ON)
    kept = []
    for workspace in (masked, make_plain(masked)):
        federation, grid = federation_of(workspace)
        federation.train_round(1)
        kept.append(private_tensors(grid))
    assert kept[0].keys() == kept[1].keys() != set()
    assert all((kept[0][n] == kept[1][n]).all() for n in kept[0])


def test_peers_on_a_circle(make_workspace: MakeWorkspace) -> None:
    settings = {**ON, "shares": 5}
    workspace = make_workspace(
        method=PROMPTFL, partition={"clients": 9}, secure_aggregation=settings
    )
    federation, grid = federation_of(workspace)
    lost = 4
    grid.spoil = lambda stage, m: None if stage == COLLECT and is_from(lost, m) else m
    line = federation.train_round(1)
    counted = [c for c in range(9) if c != lost]
    gap = np.abs(values(federation) - fedavg_of(workspace, counted)).max()
    assert gap <= bound_for(workspace, 9, counted)
    assert line["clients"]["accepted"] == 8
    asked = [m for m in grid.sent if stage_of(m) == SHARE_KEYS]
    assert {len(m.content.config_records[RECORD]) - 1 for m in asked} == {5}


def test_bytes_of_all_four_exchanges_are_counted(make_workspace: MakeWorkspace) -> None:
    federation, grid = federation_of(make_workspace(method=PROMPTFL, secure_aggregation=ON))
    line = federation.train_round(1)
    assert [stage_of(m) for m in grid.sent] == [s for s in STAGES for _ in range(4)]
    # The grid's own copies carry message ids, which the server's do not yet have.
    down = sum(len(to_wire(m)) for m in grid.sent)
    assert down <= line["bytes_down"] <= down + 40 * len(grid.sent)
    assert line["bytes_up"] == sum(len(to_wire(m)) for m in grid.got)


# What can be seen


def is_from(client: int, message: Message) -> bool:
    return client_of(message.metadata.src_node_id) == client


def masked_numbers(grid: Watched) -> dict[int, Any]:
    found = {}
    for message in grid.got:
        record = message.content.config_records[RECORD]
        if flower.Key.MASKED_PARAMETERS in record:
            content = record[flower.Key.MASKED_PARAMETERS]
            assert isinstance(content, bytes)
            client = client_of(message.metadata.src_node_id)
            found[client] = np.frombuffer(content, "<u4").astype(np.float64)
    return found


def test_no_single_update_can_be_read(make_workspace: MakeWorkspace) -> None:
    method = {"name": "promptfl", "context_tokens": 16}
    masked = make_workspace(method=method, secure_aggregation=ON)
    federation, _ = federation_of(masked)
    plain_federation, plain_grid = federation_of(make_plain(masked))
    start = values(federation)
    plain_federation.train_round(1)
    runs = []
    for _ in range(2):
        federation, grid = federation_of(masked)
        federation.train_round(1)
        runs.append(masked_numbers(grid))
    assert set(runs[0]) == {0, 1, 2, 3}
    true = {
        client_of(r.metadata.src_node_id): (to_arrays(r.content["arrays"])["ctx"] - start).ravel()  # type: ignore[arg-type]
        for r in plain_grid.got
    }
    for client in range(4):
        one, two = (r[client][1 : 1 + start.size] for r in runs)
        count, chance = one.size, 6 / one.size**0.5  # six standard deviations
        assert np.mean(one == two) < 0.01, "same training, other numbers"
        for seen in (one, two):
            assert abs(np.corrcoef(seen, true[client])[0, 1]) < chance
            assert abs(seen.mean() / MODULUS - 0.5) < chance / 12**0.5
            eighths = np.bincount((seen / MODULUS * 8).astype(int), minlength=8)
            assert ((eighths - count / 8) ** 2 / (count / 8)).sum() < 40, "chi-squared, 7 degrees"
        assert abs(np.corrcoef(one, two)[0, 1]) < chance
    total = sum(runs[0].values())
    assert abs(np.corrcoef(total[1 : 1 + start.size] % MODULUS, sum(true.values()))[0, 1]) < chance


def test_replies_hold_nothing_but_keys_shares_and_masked_numbers(
    make_workspace: MakeWorkspace,
) -> None:
    federation, grid = federation_of(make_workspace(method=PROMPTFL, secure_aggregation=ON))
    federation.train_round(1)
    key = flower.Key
    expected = [
        {key.PUBLIC_KEY_1, key.PUBLIC_KEY_2},
        {key.DESTINATION_LIST, key.CIPHERTEXT_LIST},
        {key.MASKED_PARAMETERS},
        {key.NODE_ID_LIST, key.SHARE_LIST},
    ]
    for place, reply in enumerate(grid.got):
        assert set(reply.content) == {RECORD}
        assert set(reply.content.config_records[RECORD]) == expected[place // 4]
    sizes = {sum(len(to_wire(r)) for r in grid.got[k::4]) for k in range(4)}
    assert len(sizes) == 1, "clients with different numbers of images send the same"
    assert not any(grid._secrets.values()), "nothing is kept behind the round"


def test_both_masks_lie_over_every_number(make_workspace: MakeWorkspace) -> None:
    """With Flower's alone, its seeds of at most 32 bits would do to read an update."""
    federation, grid = federation_of(make_workspace(method=PROMPTFL, secure_aggregation=ON))
    states: dict[int, Any] = {}

    def remember(stage: str | None, message: Message) -> Message:
        if stage == COLLECT:
            client = client_of(message.metadata.src_node_id)
            record = grid._secrets[client].config_records[flower.RECORD_KEY_STATE]
            states[client] = flower.SecAggPlusState(**record)
        return message

    grid.spoil = remember
    federation.train_round(1)
    seen = masked_numbers(grid)[0].astype(np.uint32)
    own, levels = states[0], Terms.of(SecureAggregationConfig(), 4).levels

    def without(layer: Callable[[bytes, int], Any]) -> Any:
        numbers = seen - layer(own.rd_seed, seen.size)
        for peer in set(own.public_keys_dict) - {own.nid}:
            secret = flower.pairwise_secret(own.sk1, own.public_keys_dict[peer][0])
            part = layer(secret, seen.size)
            numbers = numbers - part if own.nid > peer else numbers + part
        return numbers

    assert (without(mask) <= levels).all(), "without both masks the client's own numbers are left"
    only_ours: Callable[[bytes, int], Any] = stream
    assert np.mean(without(only_ours) <= levels) < 0.5
    assert np.mean(without(lambda s, n: mask(s, n) - stream(s, n)) <= levels) < 0.5


# Clients that vanish


@pytest.mark.parametrize("stage", STAGES)
def test_a_client_that_vanishes_at_any_stage(
    make_workspace: MakeWorkspace, caplog: pytest.LogCaptureFixture, stage: str
) -> None:
    workspace = make_workspace(method=PROMPTFL, secure_aggregation=ON)
    federation, grid = federation_of(workspace)
    grid.spoil = lambda at, m: None if at == stage and is_from(2, m) else m
    with caplog.at_level(logging.WARNING, "fedprompt"):
        line = federation.train_round(1)
    counted = [0, 1, 3] if stage != UNMASK else [0, 1, 2, 3]
    gap = np.abs(values(federation) - fedavg_of(workspace, counted)).max()
    assert gap <= bound_for(workspace, 4, counted)
    missing = 4 - len(counted)
    assert line["clients"] == {"sampled": 4, "accepted": 4 - missing, "rejected": missing}
    reason = f"no reply ({stage})"
    assert line.get("dropped", {}) == ({"2": reason} if missing else {})
    assert f"client 2 did not help to unmask: {reason}" in caplog.text or missing
    assert "client 2" in caplog.text
    grid.spoil = lambda at, m: m
    line = federation.train_round(2)
    assert line["clients"]["accepted"] == 4, "it is back in the next round"


@pytest.mark.parametrize("stage", STAGES)
def test_too_few_leave_the_prompts_as_they_were(
    make_workspace: MakeWorkspace, caplog: pytest.LogCaptureFixture, stage: str
) -> None:
    federation, grid = federation_of(make_workspace(method=PROMPTFL, secure_aggregation=ON))
    start = values(federation)
    gone = (1, 2)
    grid.spoil = lambda at, m: None if at == stage and any(is_from(c, m) for c in gone) else m
    with caplog.at_level(logging.WARNING, "fedprompt"):
        line = federation.train_round(1)
    assert (values(federation) == start).all()
    assert line["secure"]["void"] in caplog.text
    assert all(f"client {c} " in caplog.text or f"client {c}:" in caplog.text for c in gone)
    assert line["train"] is None
    if stage == COLLECT:
        assert not [m for m in grid.sent if stage_of(m) == UNMASK], "nobody's mask is asked for"
    grid.spoil = lambda at, m: m
    assert federation.train_round(2)["clients"]["accepted"] == 4
    assert (values(federation) != start).any()


def test_min_replies_counts_before_anything_is_unmasked(make_workspace: MakeWorkspace) -> None:
    workspace = make_workspace(
        method=PROMPTFL, secure_aggregation=ON, federation={"min_replies": 4}
    )
    federation, grid = federation_of(workspace)
    start = values(federation)
    grid.spoil = lambda at, m: None if at == COLLECT and is_from(0, m) else m
    line = federation.train_round(1)
    assert (values(federation) == start).all()
    assert "3 clients left after 'collect_masked_vectors', fewer than 4" in line["secure"]["void"]
    assert UNMASK not in {stage_of(m) for m in grid.sent}


def test_a_client_that_crashes_in_training(make_workspace: MakeWorkspace) -> None:
    attack = {"kind": "crash", "share": 0.25}
    workspace = make_workspace(method=PROMPTFL, secure_aggregation=ON, attack=attack)
    federation = Federation(workspace, open_grid(workspace.config, workspace, open_workspace))
    federation.join()
    line = federation.train_round(1)
    (reason,) = line["dropped"].values()
    assert "this client has crashed (collect_masked_vectors)" in reason
    assert line["clients"]["accepted"] == 3


def record_of(message: Message, changes: Mapping[str, Any]) -> Message:
    record = {**message.content.config_records[RECORD], **changes}
    message.content = RecordDict({**message.content, RECORD: ConfigRecord(record)})
    return message


NONSENSE: dict[str, tuple[str, dict[str, Any], str]] = {
    "key": (SETUP, {"pk1": b"no key"}, "(setup)"),
    "long key": (SETUP, {"pk2": bytes(10**6)}, "more than 1024"),
    "other peers": (SHARE_KEYS, {"dsts": [1, 2, 3]}, "other clients than its peers"),
    "no list": (SHARE_KEYS, {"ctxts": b""}, "no list 'ctxts'"),
    "short vector": (COLLECT, {"masked_params": bytes(8)}, "8 bytes instead of"),
    "giant vector": (COLLECT, {"masked_params": bytes(10**7)}, "no bytes, or more than"),
    "not bytes": (COLLECT, {"masked_params": [1.5]}, "no bytes"),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_dropped_and_named(make_workspace: MakeWorkspace, kind: str) -> None:
    stage, changes, reason = NONSENSE[kind]
    federation, grid = federation_of(make_workspace(method=PROMPTFL, secure_aggregation=ON))
    grid.spoil = lambda at, m: record_of(m, changes) if at == stage and is_from(1, m) else m
    line = federation.train_round(1)
    assert list(line["dropped"]) == ["1"]
    assert reason in line["dropped"]["1"]
    assert line["clients"]["accepted"] == 3


def test_a_sum_that_does_not_come_out_is_not_used(make_workspace: MakeWorkspace) -> None:
    federation, grid = federation_of(make_workspace(method=PROMPTFL, secure_aggregation=ON))
    start, draw = values(federation), np.random.default_rng(0)

    def garble(stage: str | None, message: Message) -> Message:
        if stage == COLLECT and is_from(1, message):
            size = len(message.content.config_records[RECORD]["masked_params"])  # type: ignore[arg-type]
            return record_of(message, {"masked_params": draw.bytes(size)})
        return message

    grid.spoil = garble
    assert "the masks do not cancel" in federation.train_round(1)["secure"]["void"]
    assert (values(federation) == start).all()


def test_wrong_shares_are_not_used(make_workspace: MakeWorkspace) -> None:
    federation, grid = federation_of(make_workspace(method=PROMPTFL, secure_aggregation=ON))
    start = values(federation)

    def garble(stage: str | None, message: Message) -> Message:
        if stage == UNMASK and is_from(1, message):
            shares: Any = message.content.config_records[RECORD]["shares"]
            return record_of(message, {"shares": [s[:4] + bytes(len(s) - 4) for s in shares]})
        return message

    grid.spoil = garble
    assert "void" in federation.train_round(1)["secure"]
    assert (values(federation) == start).all()


# A server that lies


def lie_about_lists(stage: str | None, message: Message) -> Message:
    """Client 1 is among the living and the dead: with both shares it could be unmasked."""
    if stage != UNMASK:
        return message
    record = message.content.config_records[RECORD]
    active: Any = record["active_nids"]
    return record_of(message, {"dead_nids": [active[1]]})


def hide_one(stage: str | None, message: Message) -> Message:
    if stage != UNMASK:
        return message
    active: Any = message.content.config_records[RECORD]["active_nids"]
    return record_of(message, {"active_nids": active[:-1]})


def move_itself(stage: str | None, message: Message) -> Message:
    if stage != UNMASK:
        return message
    own = message.metadata.dst_node_id
    active: Any = message.content.config_records[RECORD]["active_nids"]
    rest = [n for n in active if n != own]
    return record_of(message, {"active_nids": rest, "dead_nids": [own]})


def lower_threshold(stage: str | None, message: Message) -> Message:
    return record_of(message, {"threshold": 2}) if stage == SETUP else message


def few_levels(stage: str | None, message: Message) -> Message:
    return record_of(message, {"clipping_range": 8.0}) if stage == SETUP else message


def forward_twice(stage: str | None, message: Message) -> Message:
    if stage != COLLECT:
        return message
    record: Any = message.content.config_records[RECORD]
    return record_of(message, {"srcs": [record["srcs"][0]] * len(record["srcs"])})


def skip_a_stage(stage: str | None, message: Message) -> Message:
    return record_of(message, {STAGE: UNMASK}) if stage == COLLECT else message


LIES: dict[str, tuple[Any, str]] = {
    "in both lists": (lie_about_lists, "a client in both could be unmasked"),
    "left out of both": (hide_one, "do not fit"),
    "itself dead": (move_itself, "do not fit"),
    "threshold": (lower_threshold, "the server's terms are not the experiment's: threshold"),
    "range": (few_levels, "the server's terms are not the experiment's: clipping_range"),
    "forwarded twice": (forward_twice, "or a peer's twice"),
    "skipped": (skip_a_stage, "secure aggregation: "),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_is_refused(make_workspace: MakeWorkspace, lie: str) -> None:
    tamper, reason = LIES[lie]
    federation, grid = federation_of(make_workspace(method=PROMPTFL, secure_aggregation=ON))
    start = values(federation)
    grid.tamper = tamper
    federation.train_round(1)
    refused = [r for r in grid.got if r.has_error()]
    assert len(refused) == 4
    assert all(reason in (r.error.reason or "") for r in refused)
    assert (values(federation) == start).all()
    assert not any(grid._secrets.values()), "no second question is answered"


def test_masks_are_used_once(make_workspace: MakeWorkspace) -> None:
    """Two answers under the same masks would show their difference."""
    federation, grid = federation_of(make_workspace(method=PROMPTFL, secure_aggregation=ON))
    again: list[Message] = []

    def ask_twice(stage: str | None, message: Message) -> Message:
        if stage == COLLECT:
            again.append(from_wire(to_wire(message)))
        if stage == UNMASK and len(again) == 4:
            again.extend(InlineGrid.send_and_receive(grid, again[:4]))
        return message

    grid.tamper = ask_twice
    federation.train_round(1)
    assert len(again) == 8
    assert all(r.has_error() for r in again[4:])
    assert all("expect unmask stage" in (r.error.reason or "") for r in again[4:])


# Clip, weights, noise


def test_a_change_beyond_the_clip_is_cut_and_counted(
    make_workspace: MakeWorkspace, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**ON, "clip": 1e-4}
    workspace = make_workspace(method=PROMPTFL, secure_aggregation=settings)
    federation, _ = federation_of(workspace)
    start = values(federation)
    with caplog.at_level(logging.WARNING, "fedprompt"):
        line = federation.train_round(1)
    assert line["secure"] == {"clipped": 4}
    assert "of 4 of 4 clients were larger than secure_aggregation.clip=0.0001" in caplog.text
    step = np.abs(values(federation) - start).max()
    assert step == pytest.approx(1e-4, rel=1e-3)


def test_more_images_than_a_weight_can_say(make_workspace: MakeWorkspace) -> None:
    settings = {"enabled": True, "max_weight": 5}
    workspace = make_workspace(method=PROMPTFL, secure_aggregation=settings)
    with pytest.raises(UserError, match=r"more than secure_aggregation\.max_weight=5; raise it"):
        Federation(workspace, InlineGrid(workspace))
    alike = make_workspace(
        method=PROMPTFL,
        secure_aggregation=settings,
        strategy={"name": "fedavg", "weights": "uniform"},
    )
    assert one_round(alike)[1]["clients"]["accepted"] == 4


def test_noise_goes_into_the_sum(
    make_workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fedprompt.federation.server_app.local_epsilon", lambda config, rounds: None
    )
    privacy = {"noise": 0.1, "clip": 0.1, "noise_seed": 3}
    masked = make_workspace(method=PROMPTFL, secure_aggregation=ON, privacy=privacy)
    (ours, line), (theirs, plain) = one_round(masked), one_round(make_plain(masked))
    levels = Terms.of(masked.config.secure_aggregation, 4).levels
    assert np.abs(ours - theirs).max() <= error_bound(1.0, levels, 1.0) + np.finfo(np.float32).eps
    assert line["train"] is plain["train"] is None, "no losses"
    quiet = make_workspace(method=PROMPTFL, secure_aggregation=ON)
    assert np.abs(ours - one_round(quiet)[0]).max() > 1e-3, "there is noise"


# Config


ONE_LINE: dict[str, tuple[dict[str, Any], str]] = {
    "rule": ({"strategy": {"name": "krum"}}, "strategy 'krum' looks at single replies"),
    "central noise": ({"strategy": {"name": "dp_fedavg"}}, "'dp_fedavg' looks at single replies"),
    "subclass": ({"strategy": {"name": "nearest_peers"}}, "'nearest_peers' looks at single"),
    "scaffold": ({"strategy": {"name": "scaffold"}}, "'scaffold' looks at single replies"),
    "per class": ({"strategy": {"name": "per_class"}}, "'per_class' looks at single replies"),
    "attack": ({"attack": {"kind": "nan"}}, "attack.kind=nan is caught by checks of single"),
    "two": ({"partition": {"clients": 2}}, "needs 3 clients in a round"),
    "few": ({"federation": {"fraction": 0.3}}, "needs 3 clients in a round"),
    "half": ({"secure_aggregation": {"threshold": 0.5}}, "threshold"),
    "even": ({"secure_aggregation": {"shares": 4}}, "it must be odd and at least 3"),
    "name": ({"secure_aggregation": {"shards": 3}}, "Did you mean"),
}


@pytest.mark.parametrize("case", ONE_LINE)
def test_what_cannot_be_is_one_line(case: str) -> None:
    sections, reason = ONE_LINE[case]
    sections = {**sections, "secure_aggregation": {**ON, **sections.get("secure_aggregation", {})}}
    with pytest.raises(UserError) as refused:
        small_config(**sections)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_flower_without_it_is_one_line(
    make_workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = make_workspace(method=PROMPTFL, secure_aggregation=ON)
    monkeypatch.setattr(flower, "_missing", ImportError("no SecAgg+"))
    with pytest.raises(UserError, match="no SecAgg"):
        Federation(workspace, InlineGrid(workspace))


# Everything that uses secure aggregation is importable without Flower's private modules.
WITHOUT = """
import sys
import flwr
sys.modules["flwr.client.mod"] = None
import fedprompt.deploy.node, fedprompt.experiment.run
from fedprompt.errors import UserError
from fedprompt.privacy.secure_aggregation import require_flower
try:
    require_flower()
except UserError as error:
    print(error)
"""


def test_a_flower_without_it_serves_everything_else() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "secure_aggregation.enabled=false" in result.stdout


# Runs


def config_for(folder: Path, **sections: Any) -> Config:
    config = small_config(
        data={"images_per_class": 8, "domains": ["savanna"]},
        partition={"clients": 4, "alpha": 1.0},
        secure_aggregation=ON,
        **{"evaluation": {"every": 100, "local_only": False}, **sections},
    )
    return replace(config, output=replace(config.output, dir=str(folder)))


# Kills itself in the middle of round 2, when all clients have trained and nothing is unmasked.
KILLER = """
import os, signal, sys
from fedprompt.cli.main import app
from fedprompt.privacy.secure_aggregation import server
unmask, calls = server._Round._unmask, []
def lethal(self, shared, here):
    calls.append(0)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return unmask(self, shared, here)
server._Round._unmask = lethal
app(["run", sys.argv[1], "--quiet"])
"""


def test_a_round_that_is_repeated_begins_with_new_keys(make_workspace: MakeWorkspace) -> None:
    workspace = make_workspace(method=PROMPTFL, secure_aggregation=ON)
    unbroken, _ = federation_of(workspace)
    expected = [unbroken.train_round(r) for r in (1, 2)]
    federation, grid = federation_of(workspace)
    federation.train_round(1)
    checkpoint = federation.checkpoint(1, {"rejected": 0})

    def interrupt(stage: str | None, message: Message) -> Message:
        if stage == UNMASK:
            raise KeyboardInterrupt
        return message

    grid.tamper = interrupt
    with pytest.raises(KeyboardInterrupt):
        federation.train_round(2)
    assert all(grid._secrets.values()), "all clients wait in the middle of the protocol"
    grid.tamper = lambda stage, m: m
    federation.restore(checkpoint)
    assert federation.train_round(2) == expected[1]
    assert values(federation).tobytes() == values(unbroken).tobytes()


@pytest.mark.slow
def test_kill_and_resume_in_the_middle_of_the_protocol(tmp_path: Path) -> None:
    unbroken = run(config_for(tmp_path / "unbroken"), QuietDisplay())
    folder = tmp_path / "run"
    (tmp_path / "experiment.yaml").write_text(to_yaml(config_for(folder)))
    command = [sys.executable, "-c", KILLER, str(tmp_path / "experiment.yaml")]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert b"PRIVATE KEY" not in b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
    resume(folder, QuietDisplay())
    for name in ("prompts.safetensors", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes(), name


@pytest.mark.slow
def test_ray_ends_in_the_bits_of_the_inline_grid(tmp_path: Path) -> None:
    """With the local-only baseline behind it, which is in the clear: nothing is shared there."""
    grid, evaluation = {"threads": 1, "clients_per_block": 1}, {"every": 100, "local_only": True}

    def ended(name: str, **more: Any) -> Path:
        config = config_for(tmp_path / name, simulation={**grid, **more}, evaluation=evaluation)
        return run(config, QuietDisplay())

    inline, ray = ended("inline"), ended("ray", kind="ray", workers=2)
    for name in ("prompts.safetensors", "metrics.jsonl"):
        assert (ray / name).read_bytes() == (inline / name).read_bytes(), name
