"""The optimiser steps that a round reports are those that its clients have taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedprompt import training
from fedprompt.federation.server_app import Federation
from fedprompt.methods.parts.schedule import local_steps
from fedprompt.privacy.secure_aggregation import COLLECT
from fedprompt.simulation.attacks import attackers, handle
from fedprompt.simulation.inline_grid import InlineGrid
from tests.support.secure_rounds import ON, MakeWorkspace, federation_of, is_from

# Clients of different sizes, several steps per epoch, and one client per block: every step of the
# optimiser is then one client's.
SETTINGS: dict[str, Any] = {
    "training": {"batch_size": 5, "local_epochs": 2},
    "simulation": {"clients_per_block": 1, "threads": 1},
}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Has one entry for every step that an optimiser has taken."""
    steps: list[None] = []
    build = training.build_optimizer

    def counting(*arguments: Any) -> torch.optim.Optimizer:
        optimizer = build(*arguments)
        optimizer.register_step_post_hook(lambda *_: steps.append(None))
        return optimizer

    monkeypatch.setattr(training, "build_optimizer", counting)
    return steps


def test_sampled_clients_are_counted(make_workspace: MakeWorkspace, taken: list[None]) -> None:
    workspace = make_workspace(federation={"fraction": 0.5}, **SETTINGS)
    federation = Federation(workspace, InlineGrid(workspace))
    federation.join()
    steps = [federation.train_round(r)["client_steps"] for r in (1, 2)]
    assert sum(steps) == len(taken)
    assert steps[0] != steps[1], "other clients with other numbers of images"


@pytest.mark.parametrize("kind", ["nan", "crash"])
def test_dropped_clients_are_counted_if_they_have_trained(
    make_workspace: MakeWorkspace, taken: list[None], kind: str
) -> None:
    workspace = make_workspace(attack={"kind": kind, "share": 0.25}, **SETTINGS)
    (bad,) = attackers(workspace.config.seed, range(workspace.num_clients), 0.25)
    federation = Federation(workspace, InlineGrid(workspace, answer=handle))
    federation.join()
    line = federation.train_round(1)
    assert list(line["dropped"]) == [str(bad)]
    # An error in place of a reply does not tell how far the client has come.
    lost = local_steps(len(workspace.partition.train(bad)), workspace.config.training)
    assert line["client_steps"] == len(taken) - (lost if kind == "crash" else 0)


def test_masked_updates_are_counted(make_workspace: MakeWorkspace, taken: list[None]) -> None:
    workspace = make_workspace(secure_aggregation=ON, **SETTINGS)
    federation, grid = federation_of(workspace)
    silent = 2
    grid.spoil = lambda stage, m: None if stage == COLLECT and is_from(silent, m) else m
    line = federation.train_round(1)
    assert [*line["dropped"]] == [str(silent)]
    lost = local_steps(len(workspace.partition.train(silent)), workspace.config.training)
    assert 0 < line["client_steps"] == len(taken) - lost
