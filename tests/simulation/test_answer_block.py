"""Blocks that do not fit into the memory, and devices that fail: no client is lost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from flwr.app import MessageType

from fedprompt.errors import DeviceFault
from fedprompt.federation.client_app import handle
from fedprompt.federation.server_app import Federation
from fedprompt.runtime.allocations import Allocations
from fedprompt.simulation import answer_block
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.workspace import Workspace
from tests.support.allocator import ShortMemory
from tests.support.grids import assert_same, federate

MakeWorkspace = Callable[..., Workspace]
EIGHT = {"partition": {"clients": 8, "scheme": "iid"}, "federation": {"rounds": 3}}


def block_of_8(make_workspace: MakeWorkspace) -> Workspace:
    simulation = {"clients_per_block": 8, "threads": 1}
    return make_workspace(method={"name": "promptfl"}, simulation=simulation, **EIGHT)


@pytest.fixture(scope="module")
def need(make_workspace: MakeWorkspace) -> int:
    """Bytes at the peak of a round of eight clients in one block."""
    grid = InlineGrid(block_of_8(make_workspace))
    federation = Federation(grid.workspace, grid)
    federation.join()
    with Allocations() as made:
        federation.train_round(1)
    return made.peak


class OnSmallDevice:
    """Answers as `handle` does, with limited memory; counts its calls' clients."""

    def __init__(self, limit: float, error: type[RuntimeError]) -> None:
        self.memory = ShortMemory(limit, error)
        self.tried: list[int] = []

    def __call__(self, workspace: Any, clients: Sequence[int], messages: Any, private: Any) -> Any:
        if messages[0].metadata.message_type != MessageType.TRAIN:
            return handle(workspace, clients, messages, private)
        self.tried.append(len(clients))
        with self.memory:
            return handle(workspace, clients, messages, private)


@pytest.mark.parametrize(
    ("share", "tried", "error"),
    [
        (0.3, [8, 4, 2, 2, 2, 2], RuntimeError),  # PyTorch has no type of its own on CPUs
        (0.5, [8, 4, 2, 2, 2, 2], torch.OutOfMemoryError),
        (0.9, [8, 4, 4], torch.OutOfMemoryError),
    ],
)
def test_a_block_that_does_not_fit_is_halved_and_the_size_remembered(
    make_workspace: MakeWorkspace,
    need: int,
    share: float,
    tried: list[int],
    error: type[RuntimeError],
    caplog: pytest.LogCaptureFixture,
) -> None:
    answer = OnSmallDevice(share * need, error)
    grid = InlineGrid(block_of_8(make_workspace), answer=answer)
    federation = Federation(grid.workspace, grid)
    federation.join()
    with caplog.at_level(logging.WARNING, logger="fedprompt.grid"):
        for server_round in (1, 2):
            line = federation.train_round(server_round)
            assert line["clients"] == {"sampled": 8, "accepted": 8, "rejected": 0}
    # Only the first block is tried in vain.
    assert answer.tried == tried + tried.count(tried[-1]) * [tried[-1]]
    assert answer.memory.refused == len(set(tried)) - 1
    assert len(caplog.records) == 1
    assert f"simulation.clients_per_block={tried[-1]}" in caplog.text


def test_the_size_that_fitted_gives_the_same_bits_when_it_is_configured(
    make_workspace: MakeWorkspace, need: int
) -> None:
    answer = OnSmallDevice(0.9 * need, torch.OutOfMemoryError)
    halved = federate(InlineGrid(block_of_8(make_workspace), answer=answer), 2)
    simulation = {"clients_per_block": 4, "threads": 1}
    workspace = make_workspace(method={"name": "promptfl"}, simulation=simulation, **EIGHT)
    assert_same(halved, federate(InlineGrid(workspace), 2), rtol=0)


def test_nothing_of_a_failed_call_is_alive_during_the_next(
    make_workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Allocations()
    alive: list[int] = []

    def failing(workspace: Any, clients: Sequence[int], *rest: Any) -> Any:
        alive.append(made.now)
        with made:
            kept = torch.zeros(1000)
            if len(clients) > 1:
                raise RuntimeError("a fault of one client")
        del kept
        return handle(workspace, clients, *rest)

    grid = InlineGrid(block_of_8(make_workspace), answer=failing)
    federation = Federation(grid.workspace, grid)
    federation.join()
    assert federation.train_round(1)["clients"]["accepted"] == 8
    assert len(alive) == 9
    assert set(alive) == {0}


def test_one_client_that_never_fits_is_rejected_with_the_reason(
    make_workspace: MakeWorkspace, need: int
) -> None:
    answer = OnSmallDevice(0.01 * need, torch.OutOfMemoryError)
    workspace = make_workspace(partition={"clients": 2}, simulation={"clients_per_block": 2})
    federation = Federation(workspace, InlineGrid(workspace, answer=answer))
    federation.join()
    assert federation.train_round(1)["clients"] == {"sampled": 2, "accepted": 0, "rejected": 2}
    assert federation.strategy.rejected[0].startswith("OutOfMemoryError: ")


class Sticky(RuntimeError):
    """Stands for `torch.AcceleratorError`, which older releases of PyTorch do not have."""


def test_a_failed_device_is_no_clients_fault(
    make_workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_block, "DEVICE_ERRORS", (Sticky,))

    def failing(*_: Any) -> Any:
        raise Sticky("CUDA error: an illegal memory access was encountered")

    grid = InlineGrid(block_of_8(make_workspace), answer=failing)
    federation = Federation(grid.workspace, grid)
    federation.join()
    with pytest.raises(DeviceFault, match="illegal memory access"):
        federation.train_round(1)
