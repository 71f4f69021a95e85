"""Clients that join after training."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedprompt.config.fields import build
from fedprompt.config.schema import PartitionConfig
from fedprompt.errors import UserError
from fedprompt.evaluation.protocol import Finished
from fedprompt.evaluation.protocols.late_joiners import LateJoiners, LateJoinersOptions
from fedprompt.federation.server_app import Federation
from fedprompt.scoring import score_personal
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.training import train_clients
from fedprompt.workspace import Workspace
from tests.support.secure_rounds import MakeWorkspace

PARTITION: dict[str, Any] = {"late_clients": 2}


def protocol(workspace: Workspace, **options: Any) -> LateJoiners:
    return LateJoiners(LateJoinersOptions(**options), workspace.config)


def test_late_clients_are_never_asked_to_train(make_workspace: MakeWorkspace) -> None:
    workspace = make_workspace(partition=PARTITION)
    assert len(workspace.late) == workspace.round_size == workspace.config.able_to_train == 2
    federation = Federation(workspace, InlineGrid(workspace))
    federation.join()
    federation.train_round(1)
    assert set(federation.strategy.sampled) == set(range(4)) - workspace.late
    assert federation.describe()["late_clients"] == sorted(workspace.late)
    more = make_workspace(partition={"late_clients": 3})
    assert workspace.late < more.late
    plain = make_workspace()
    assert not plain.late
    assert "late_clients" not in plain.describe()
    assert (plain.partition.train_flat == workspace.partition.train_flat).all()


@pytest.mark.parametrize("method", ["promptfl", "fedpgp"])
def test_numbers_are_those_of_training_and_testing_each_client(
    make_workspace: MakeWorkspace, method: str
) -> None:
    workspace = make_workspace(
        partition=PARTITION, method={"name": method}, training={"lr": 0.5, "batch_size": 3}
    )
    measured = protocol(workspace, steps=[0, 3])
    start = workspace.method.init_shared(workspace.config.seed)
    shared = {n: v + 0.05 for n, v in start.items()}
    rows = measured.measure_clients(workspace, range(4), [shared] * 4, [{}] * 4)
    assert [k for k, row in enumerate(rows) if row["tested"]] == sorted(workspace.late)
    assert not any(row["joined-3"] for k, row in enumerate(rows) if k not in workspace.late)
    for client in workspace.late:
        data = workspace.train_data(client)
        epochs = math.ceil(3 / math.ceil(len(data) / 3))
        training = replace(workspace.config.training, local_epochs=epochs, schedule="constant")
        rounds = workspace.config.federation.rounds
        for name, received in (("joined", shared), ("alone", start)):
            own = workspace.start_private(client)
            untouched, _ = score_personal(
                workspace.method, [received], [own], [workspace.test_data(client)]
            )
            (result,) = train_clients(
                workspace.method, [received], [own], [data], training,
                seed=workspace.config.seed, server_round=rounds, rounds=rounds, max_steps=3,
            )  # fmt: skip
            trained, _ = score_personal(
                workspace.method, [result.shared], [result.private], [workspace.test_data(client)]
            )
            assert rows[client][f"{name}-0"] == untouched[0].correct
            assert rows[client][f"{name}-3"] == trained[0].correct
            assert rows[client]["tested"] == trained[0].tested


def test_training_stops_after_the_last_step_that_is_asked_for(
    make_workspace: MakeWorkspace,
) -> None:
    workspace = make_workspace(method={"name": "promptfl"}, training={"batch_size": 4})
    method, config = workspace.method, workspace.config
    data = [workspace.train_data(client) for client in range(4)]
    start = [method.init_shared(config.seed)] * 4
    per_epoch = [math.ceil(len(d) / 4) for d in data]

    def trained(epochs: int, max_steps: int | None) -> list[Any]:
        training = replace(config.training, local_epochs=epochs)
        return train_clients(
            method, start, [{}] * 4, data, training, seed=1, server_round=1, rounds=1,
            max_steps=max_steps,
        )  # fmt: skip

    whole, limited = trained(1, None), trained(3, min(per_epoch))
    shortest = per_epoch.index(min(per_epoch))
    torch.testing.assert_close(whole[shortest].shared, limited[shortest].shared)
    assert whole[shortest].losses == pytest.approx(limited[shortest].losses)
    longest = per_epoch.index(max(per_epoch))
    assert max(per_epoch) > min(per_epoch)
    assert not torch.equal(whole[longest].shared["ctx"], limited[longest].shared["ctx"])


def test_means_are_over_late_clients_with_test_images(make_workspace: MakeWorkspace) -> None:
    workspace = make_workspace(partition=PARTITION)
    first, second = sorted(workspace.late)
    (other, _) = sorted(set(range(4)) - workspace.late)

    def numbers(tested: int, joined: int, alone: int) -> dict[str, int]:
        return {"tested": tested, "zero-shot": 1, "joined-5": joined, "alone-5": alone}

    clients = {first: numbers(4, 3, 1), second: numbers(2, 1, 1), other: numbers(9, 9, 9)}
    run = Finished(workspace, {}, clients, [], {})
    part = protocol(workspace, steps=[5]).measure(run)
    assert part["clients"] == [first, second]
    (row,) = part["rows"]
    assert row["joined"]["mean"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert row["alone"]["mean"] == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert part["zero_shot"]["mean"] == pytest.approx((1 / 4 + 1 / 2) / 2)
    table, figure = LateJoiners.compare([("a", part), ("b", part)])
    assert [r[0] for r in table.rows] == ["5 (a)", "5 (b)"]
    assert len(figure.panels[0].curves) == 4


def test_settings_that_cannot_be_meant_are_refused(make_workspace: MakeWorkspace) -> None:
    with pytest.raises(UserError, match="late_clients"):
        protocol(make_workspace()).open(make_workspace())
    zero = make_workspace(partition=PARTITION, method={"name": "zero_shot"})
    with pytest.raises(UserError, match="zero_shot"):
        protocol(zero).open(zero)
    for steps in ([], [1, 1], [-1]):
        with pytest.raises(UserError, match="steps"):
            build(LateJoinersOptions, {"steps": steps}, "protocol_options.late_joiners")
    for keys in ({"late_clients": 4}, {"late_clients": 1, "unlabelled_clients": 1}):
        with pytest.raises(UserError, match="late_clients"):
            build(PartitionConfig, {"clients": 4, **keys}, "partition")
