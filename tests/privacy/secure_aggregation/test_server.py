"""The server: clients that drop out, malformed replies, wrong shares."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedprompt.experiment.workspaces import open_workspace
from fedprompt.federation.server_app import Federation
from fedprompt.privacy.secure_aggregation import (
    COLLECT,
    CONFIRM,
    RECORD,
    SETUP,
    SHARE_KEYS,
    UNMASK,
    stage_of,
)
from fedprompt.simulation.grids import open_grid
from tests.support.secure_rounds import (
    ON,
    PROMPTFL,
    STAGES,
    MakeWorkspace,
    bound_for,
    fedavg_of,
    federation_of,
    is_from,
    record_of,
    values,
)

# Dropouts


@pytest.mark.parametrize("stage", STAGES)
def test_a_client_that_vanishes_at_any_stage(
    make_workspace: MakeWorkspace, caplog: pytest.LogCaptureFixture, stage: str
) -> None:
    workspace = make_workspace(method=PROMPTFL, secure_aggregation=ON)
    federation, grid = federation_of(workspace)
    grid.spoil = lambda at, m: None if at == stage and is_from(2, m) else m
    with caplog.at_level(logging.WARNING, "fedprompt"):
        line = federation.train_round(1)
    counted = [0, 1, 3] if stage not in (CONFIRM, UNMASK) else [0, 1, 2, 3]
    gap = np.abs(values(federation) - fedavg_of(workspace, counted)).max()
    assert gap <= bound_for(workspace, 4, counted)
    missing = 4 - len(counted)
    assert line["clients"] == {"sampled": 4, "accepted": 4 - missing, "rejected": missing}
    reason = f"no reply ({stage})"
    assert line.get("dropped", {}) == ({"2": reason} if missing else {})
    assert f"client 2: did not help to unmask: {reason}" in caplog.text or missing
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
    assert "clients 1, 2: " in caplog.text
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


# Malformed replies


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
