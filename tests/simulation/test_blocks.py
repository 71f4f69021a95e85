"""Which clients share a block, and how large it is."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import MessageType

from fedprompt.config.schema import SimulationConfig
from fedprompt.runtime import thread_count, use_threads
from fedprompt.runtime.device_memory import free_memory
from fedprompt.simulation.blocks import CPU_TOKENS, choose_size, group, work
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.workspace import Workspace

MakeWorkspace = Callable[..., Workspace]
PLENTY = math.inf


def sized(clients_per_block: int = 0, tokens: int = 96) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(simulation=SimulationConfig(clients_per_block=clients_per_block)),
        clip=SimpleNamespace(device=torch.device("cpu")),
        tokens_per_client=tokens,
    )


def test_work_is_images_times_epochs_or_test_images(make_workspace: MakeWorkspace) -> None:
    workspace = make_workspace(training={"local_epochs": 3})
    for client in range(4):
        images = len(workspace.partition.train(client))
        assert work(workspace, MessageType.TRAIN, client) == 3 * images
        tests = len(workspace.partition.test(client))
        assert work(workspace, MessageType.EVALUATE, client) == max(1, tests)
        assert work(workspace, MessageType.QUERY, client) == 1
    assert work(workspace, MessageType.TRAIN, 99) == 1  # no such client: it will say so itself


def test_clients_with_similar_work_come_together(make_workspace: MakeWorkspace) -> None:
    workspace = make_workspace(partition={"clients": 9, "alpha": 0.5})
    images = [len(workspace.partition.train(c)) for c in range(9)]
    assert len(set(images)) > 3
    clients = [5, 0, 8, 3, 1]
    blocks = group(workspace, clients, 2)
    assert [len(c) for c in blocks] == [2, 2, 1]
    grouped = [clients[place] for block in blocks for place in block]
    assert grouped == sorted(clients, key=lambda c: (-images[c], c))
    # The order in which clients are asked does not matter.
    again = [[clients[::-1][p] for p in block] for block in group(workspace, clients[::-1], 2)]
    assert again == [[clients[p] for p in block] for block in blocks]


def test_replies_come_in_the_order_of_the_messages(make_workspace: MakeWorkspace) -> None:
    from tests.support.grids import introduce, queries

    workspace = make_workspace(partition={"clients": 9}, simulation={"clients_per_block": 2})
    grid = InlineGrid(workspace, answer=introduce)
    asked = [5, 0, 8, 3, 1]
    replies = grid.send_and_receive(queries(asked))
    assert [r.content["metrics"]["client"] for r in replies] == asked


@pytest.mark.parametrize(
    ("clients", "workers", "threads", "expected"),
    [
        (100, 1, 1, 4),  # 384 tokens per thread, 96 per client
        (100, 1, 2, 8),
        (3, 1, 2, 3),
        (9, 1, 2, 5),  # two calls of 5 and 4, not of 8 and 1
        (10, 2, 2, 5),  # both workers have the same share
        (20, 2, 2, 5),
        (1, 4, 1, 1),
    ],
)
def test_size_fills_the_processor_and_all_workers(
    clients: int, workers: int, threads: int, expected: int
) -> None:
    assert CPU_TOKENS == 384
    assert choose_size(sized(), clients, workers, PLENTY, threads) == expected


def test_memory_only_lowers_the_size() -> None:
    def size(free: float) -> int:
        return choose_size(sized(), 100, 1, free, 2, client_bytes=1000)

    assert size(PLENTY) == size(1e9) == 8
    assert size(2 * 3 * 1000) == 3  # half of it holds three clients
    assert size(0) == 1
    configured = sized(clients_per_block=6)
    assert choose_size(configured, 100, 1, 0, 2, client_bytes=1000) == 6


def test_one_client_larger_than_the_processor_needs_is_a_block() -> None:
    assert choose_size(sized(tokens=5000), 10, 1, PLENTY, 1) == 1


def test_a_size_that_memory_lowers_is_logged_once(
    make_workspace: MakeWorkspace, caplog: pytest.LogCaptureFixture
) -> None:
    grid = InlineGrid(make_workspace())
    with caplog.at_level(logging.WARNING, logger="fedprompt.simulation.block_grid"):
        assert grid.clients_per_block(4) > 1
        assert not caplog.records
        grid._free_bytes = 1.0
        assert [grid.clients_per_block(4), grid.clients_per_block(4)] == [1, 1]
    assert len(caplog.records) == 1
    assert "blocks of 1 clients instead of" in caplog.text


def test_free_memory_is_a_number_of_bytes() -> None:
    assert 1e7 < free_memory(torch.device("cpu")) < 1e14


def test_threads_are_the_configured_ones_or_a_workers_cpus() -> None:
    before = torch.get_num_threads()
    try:
        assert thread_count(SimulationConfig(threads=3), worker=True) == 3
        assert thread_count(SimulationConfig(cpus_per_worker=2.5), worker=True) == 2
        assert thread_count(SimulationConfig(cpus_per_worker=0.5), worker=True) == 1
        assert thread_count(SimulationConfig()) == before
        use_threads(SimulationConfig(threads=2))
        assert torch.get_num_threads() == 2
        use_threads(SimulationConfig())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
