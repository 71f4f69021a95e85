"""Which sums a server can learn: one list of survivors, and one set of clients per start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedprompt.deploy.sum_log import FILE, FileSumLog
from fedprompt.errors import UserError
from fedprompt.federation.server_app import Federation
from fedprompt.messages import client_of, to_arrays
from fedprompt.privacy.secure_aggregation import (
    COLLECT,
    CONFIRM,
    RECORD,
    UNMASK,
    stage_of,
)
from fedprompt.privacy.secure_aggregation.client import answer
from fedprompt.privacy.secure_aggregation.survivors import SURVIVORS
from fedprompt.simulation import block_grid
from tests.support.secure_rounds import (
    ON,
    PROMPTFL,
    MakeWorkspace,
    TappedGrid,
    federation_of,
    is_from,
    record_of,
    values,
)

# Lists that differ by client


@pytest.mark.parametrize("told", range(7))
def test_two_lists_are_never_both_unmasked(make_workspace: MakeWorkspace, told: int) -> None:
    """Some of six clients are told that all survive, the others that the last has left."""
    workspace = make_workspace(method=PROMPTFL, partition={"clients": 6}, secure_aggregation=ON)
    federation, grid = federation_of(workspace)

    def lie(stage: str | None, message: Message) -> Message:
        if stage != CONFIRM:
            return message
        client = client_of(message.metadata.dst_node_id)
        survivors: Any = message.content.config_records[RECORD][SURVIVORS]
        # A client does not confirm that it has left, so the last one is among those told the truth.
        truth = client >= 6 - told
        return message if truth else record_of(message, {SURVIVORS: survivors[:-1]})

    grid.tamper = lie
    before = values(federation)
    line = federation.train_round(1)
    helped = [r for r in grid.got if not r.has_error() and "shares" in dict(_record(r))]
    # Of six shares five are needed.
    assert len(helped) == (told if told >= 5 else 0)
    assert ("void" in line["secure"]) == (told < 5)
    assert (values(federation) == before).all() == (told < 5)


def test_other_prompts_for_one_client_spoil_the_sum(make_workspace: MakeWorkspace) -> None:
    """Were the changes of the others zero, the sum would be that of the one client."""
    workspace = make_workspace(method=PROMPTFL, secure_aggregation=ON)
    federation, grid = federation_of(workspace)

    def single_out(stage: str | None, message: Message) -> Message:
        if stage == COLLECT and client_of(message.metadata.dst_node_id) == 2:
            arrays: Any = message.content["arrays"]
            moved = {n: Array(a + np.float32(0.1)) for n, a in to_arrays(arrays).items()}
            message.content = RecordDict({**message.content, "arrays": ArrayRecord(moved)})
        return message

    grid.tamper = single_out
    before = values(federation)
    line = federation.train_round(1)
    assert "masks do not cancel" in line["secure"]["void"]
    assert (values(federation) == before).all()


def test_clients_that_cannot_be_reached_do_not_lower_the_threshold(
    make_workspace: MakeWorkspace,
) -> None:
    workspace = make_workspace(method=PROMPTFL, partition={"clients": 6}, secure_aggregation=ON)
    assert workspace.round_size == 6
    for reached, counts in ((5, True), (4, False)):
        federation, grid = federation_of(workspace)
        nodes = dict(list(federation.strategy.known.node_of_client.items())[:reached])
        federation.strategy.set_nodes(nodes)
        line = federation.train_round(1)
        assert line["clients"]["sampled"] == reached
        assert ("void" not in line["secure"]) == counts
        asked = {m.content.config_records[RECORD]["sample_num"] for m in grid.sent[:reached]}
        assert asked == {6}


@pytest.mark.parametrize("fraction", [0.34, 0.5, 0.75, 1.0])
def test_the_size_of_a_round_is_what_is_drawn(
    make_workspace: MakeWorkspace, fraction: float
) -> None:
    workspace = make_workspace(
        method=PROMPTFL, partition={"clients": 9}, federation={"fraction": fraction}
    )
    federation, _ = federation_of(workspace)
    assert workspace.round_size == len(federation.strategy.sample(1))


# Rounds that are repeated


@pytest.fixture
def remembering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Clients keep on disk which sums they have helped to unmask, as on nodes."""

    def with_log(config: Any, message: Message, *args: Any, **options: Any) -> Message:
        log = FileSumLog(tmp_path / str(client_of(message.metadata.dst_node_id)))
        return answer(config, message, *args, log_of_sums=log, **options)

    monkeypatch.setattr(block_grid, "masked_answer", with_log)
    return tmp_path


def without(client: int, grid: TappedGrid) -> None:
    grid.spoil = lambda stage, m: None if stage == COLLECT and is_from(client, m) else m


def interrupted(workspace: Any) -> tuple[Federation, TappedGrid, Any, Any]:
    """Round 1 has been unmasked, and a crash has then undone it; also both states' prompts."""
    federation, grid = federation_of(workspace)
    checkpoint = federation.checkpoint(0, {"rejected": 0})
    before = values(federation)
    federation.train_round(1)
    after = values(federation)
    federation.restore(checkpoint)
    assert (values(federation) == before).all()
    return federation, grid, before, after


def test_the_difference_of_two_sums_is_one_clients_change(make_workspace: MakeWorkspace) -> None:
    """What the record of sums prevents: without it, a missing client's change can be computed."""
    workspace = make_workspace(method=PROMPTFL, secure_aggregation=ON)
    federation, grid, before, after = interrupted(workspace)
    without(3, grid)
    federation.train_round(1)
    repeated = values(federation)
    images = [len(workspace.partition.train(c)) for c in range(4)]
    change = (sum(images) * (after - before) - sum(images[:3]) * (repeated - before)) / images[3]
    alone = make_workspace(method=PROMPTFL)
    plain, plain_grid = federation_of(alone)
    plain.train_round(1)
    (reply,) = (r for r in plain_grid.got if is_from(3, r))
    arrays: Any = reply.content["arrays"]
    assert np.abs(change - (to_arrays(arrays)["ctx"] - before)).max() < 1e-6


@pytest.mark.parametrize("server_round", [1, 2])
def test_a_lost_round_is_not_summed_for_other_clients(
    make_workspace: MakeWorkspace, remembering: Path, server_round: int
) -> None:
    """Neither repeated nor followed by a round from the same prompts, while a client is away."""
    workspace = make_workspace(method=PROMPTFL, secure_aggregation=ON)
    federation, grid, before, after = interrupted(workspace)
    assert [p.stat().st_mode & 0o777 for p in remembering.rglob(FILE)] == [0o600] * 4
    without(3, grid)
    line = federation.train_round(server_round)
    assert "void" in line["secure"]
    assert (values(federation) == before).all()
    refused = [r.error.reason or "" for r in grid.got if r.has_error()]
    assert len(refused) == 3
    assert all("the same clients" in reason for reason in refused)
    assert [m for m in grid.sent if stage_of(m) == UNMASK][4:] == [], "no share is asked for"
    # With the same clients the round is repeated, with other keys and the same result.
    grid.spoil = lambda stage, m: m
    federation.train_round(1)
    assert (values(federation) == after).all()
    keys = [_record(r)["pk1"] for r in grid.got if "pk1" in _record(r)]
    assert len(set(keys)) == len(keys) == 12
    # And from other prompts any clients may be summed.
    without(3, grid)
    assert federation.train_round(2)["clients"]["accepted"] == 3


def test_a_round_that_was_never_unmasked_is_repeated_with_anybody(
    make_workspace: MakeWorkspace, remembering: Path
) -> None:
    workspace = make_workspace(method=PROMPTFL, secure_aggregation=ON)
    federation, grid = federation_of(workspace)
    grid.tamper = lambda stage, m: None if stage == UNMASK else m
    assert "void" in federation.train_round(1)["secure"]
    assert not list(remembering.rglob(FILE))
    grid.tamper = lambda stage, m: m
    without(3, grid)
    assert federation.train_round(2)["clients"]["accepted"] == 3


def test_a_damaged_record_of_sums_names_the_file(tmp_path: Path) -> None:
    log = FileSumLog(tmp_path)
    log.put("start", "survivors")
    assert FileSumLog(tmp_path).get("start") == "survivors"
    assert log.get("other") is None
    (tmp_path / FILE).write_text("{")
    for access in (lambda: log.get("start"), lambda: log.put("start", "others")):
        with pytest.raises(UserError, match=FILE):
            access()


def _record(reply: Message) -> Any:
    return {} if reply.has_error() else reply.content.config_records[RECORD]
