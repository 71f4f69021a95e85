"""The client: what its messages reveal, and which requests it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedprompt.config.protection import SecureAggregationConfig
from fedprompt.messages import client_of, from_wire, to_arrays, to_wire
from fedprompt.privacy.secure_aggregation import (
    COLLECT,
    CONFIRM,
    RECORD,
    SETUP,
    STAGE,
    UNMASK,
    flower,
    stage_of,
)
from fedprompt.privacy.secure_aggregation.masks import mask, stream
from fedprompt.privacy.secure_aggregation.params import MODULUS, Terms
from fedprompt.privacy.secure_aggregation.survivors import (
    PEERS,
    SURVIVORS,
    TAGS,
    start_of,
)
from fedprompt.simulation.inline_grid import InlineGrid
from tests.support.secure_rounds import (
    ON,
    PROMPTFL,
    MakeWorkspace,
    federation_of,
    make_plain,
    masked_numbers,
    record_of,
    values,
)

# What a server sees


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
        {PEERS, TAGS},
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
    asked = next(m for m in grid.sent if stage_of(m) == COLLECT)
    start = start_of(asked.content)

    def both(secret: bytes, count: int) -> Any:
        return mask(secret, count, start)

    def only_ours(secret: bytes, count: int) -> Any:
        return stream(secret, count, start)

    def only_flowers(secret: bytes, count: int) -> Any:
        return mask(secret, count) - stream(secret, count)

    def without(layer: Callable[[bytes, int], Any]) -> Any:
        numbers = seen - layer(own.rd_seed, seen.size)
        for peer in set(own.public_keys_dict) - {own.nid}:
            secret = flower.pairwise_secret(own.sk1, own.public_keys_dict[peer][0])
            part = layer(secret, seen.size)
            numbers = numbers - part if own.nid > peer else numbers + part
        return numbers

    assert (without(both) <= levels).all(), "without both masks the client's own numbers are left"
    assert np.mean(without(only_ours) <= levels) < 0.5
    assert np.mean(without(only_flowers) <= levels) < 0.5


# A server that deviates from the protocol


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


def name_fewer_clients(stage: str | None, message: Message) -> Message:
    fewer = {"sample_num": 3, "share_num": 3, "threshold": 3}
    return record_of(message, fewer) if stage == SETUP else message


def shorten_the_list(stage: str | None, message: Message) -> Message:
    if stage != CONFIRM:
        return message
    survivors: Any = message.content.config_records[RECORD][SURVIVORS]
    return record_of(message, {SURVIVORS: survivors[:2]})


def forge_tags(stage: str | None, message: Message) -> Message:
    if stage != UNMASK:
        return message
    tags: Any = message.content.config_records[RECORD][TAGS]
    return record_of(message, {TAGS: [tags[0], *[bytes(32)] * (len(tags) - 1)]})


def return_own_tags(stage: str | None, message: Message) -> Message:
    """To every client, the tags are said to be from its peers in another order."""
    if stage != UNMASK:
        return message
    peers: Any = message.content.config_records[RECORD][PEERS]
    return record_of(message, {PEERS: peers[1:] + peers[:1]})


def skip_the_confirmation(stage: str | None, message: Message) -> Message:
    return record_of(message, {STAGE: UNMASK}) if stage == CONFIRM else message


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
    "fewer clients": (name_fewer_clients, "not the experiment's: sample_num, share_num"),
    "short list": (shorten_the_list, "list of survivors cannot be right"),
    "forged tags": (forge_tags, "2 of this client's peers have confirmed"),
    "tags of others": (return_own_tags, "1 of this client's peers have confirmed"),
    "not confirmed": (skip_the_confirmation, "before the survivors have been confirmed"),
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
