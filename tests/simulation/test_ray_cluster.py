"""Several raylets: what a killed worker or node in the middle of a round leaves of the result."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from flwr.app import MessageType
from ray.cluster_utils import Cluster

from fedprompt.errors import UserError
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.federation.client_app import handle
from fedprompt.simulation import ray_pool
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.simulation.ray_grid import RayGrid
from fedprompt.workspace import Workspace
from tests.support.grids import assert_same, federate, scenes, wait_for_workers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes through /proc"),
]


def noted(marks: str, workspace: Any, clients: Sequence[int], messages: Any, private: Any) -> Any:
    """`handle`, slowed down; says in a file which process has begun to train which clients."""
    if messages[0].metadata.message_type == MessageType.TRAIN:
        (Path(marks) / f"{os.getpid()}-{clients[0]}").touch()
        time.sleep(0.3)
    return handle(workspace, clients, messages, private)


@contextmanager
def in_mid_round(marks: Path, pid: int, act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` as soon as process `pid` trains; checks that it did."""
    acted = threading.Event()
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            if any(mark.name.startswith(f"{pid}-") for mark in marks.iterdir()):
                act()
                acted.set()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
        assert acted.is_set(), "the worker to be lost was never given a block"
    finally:
        over.set()
        thread.join()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without CPUs and two nodes with one each: three raylets."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # for `noted`
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    pids: list[int] = []
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        pids = [p.process.pid for n in cluster.list_all_nodes() for p in processes(n)]
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
    gone_by = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < gone_by, "a Ray process is left behind"
        time.sleep(0.1)


def processes(node: Any) -> list[Any]:
    return [p for kind in node.all_processes.values() for p in kind]


def open_on(cluster: Cluster, marks: Path, **grid: Any) -> RayGrid:
    config = scenes(simulation={"ray_address": cluster.address, "clients_per_block": 1, **grid})
    return RayGrid(open_workspace(config), opener=open_workspace, answer=partial(noted, str(marks)))


def inline(workspace: Workspace) -> Any:
    return federate(InlineGrid(workspace), 2)


def node_with(cluster: Cluster, grid: RayGrid, pid: int) -> Any:
    """The cluster's node on which a worker runs."""
    place = next(s.place for s in grid.pool.slots if s.place and s.place.pid == pid)
    return next(n for n in cluster.list_all_nodes() if n.node_id in place.memory)


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_workers_spread_and_a_node_killed_in_mid_round_changes_nothing(
    cluster: Cluster, tmp_path: Path
) -> None:
    grid = open_on(cluster, tmp_path)
    try:
        assert len({slot.place.memory for slot in grid.pool.slots if slot.place}) == 2
        expected = inline(grid.workspace)
        victim = grid.pids()[0]
        node = node_with(cluster, grid, victim)
        # No other node has room for a worker in its place: the round goes on with the other one.
        with in_mid_round(tmp_path, victim, partial(cluster.remove_node, node, False)):
            assert_same(federate(grid, 2), expected, rtol=0)
        assert gone(victim)
        assert len(grid.pids()) == 1
        # A node that joins gets the worker that still waits for a place.
        cluster.add_node(num_cpus=1)
        wait_for_workers(grid)
        assert len(set(grid.pids()) - {victim}) == 2
    finally:
        grid.close()


def test_a_worker_killed_in_mid_round_changes_nothing(cluster: Cluster, tmp_path: Path) -> None:
    grid = open_on(cluster, tmp_path)
    try:
        expected = inline(grid.workspace)
        victim = grid.pids()[1]
        with in_mid_round(tmp_path, victim, partial(os.kill, victim, signal.SIGKILL)):
            assert_same(federate(grid, 2), expected, rtol=0)
        assert victim not in grid.pids()
    finally:
        grid.close()


def test_with_no_worker_left_and_no_room_the_run_ends_with_one_line(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = open_on(cluster, tmp_path, workers=1)
    monkeypatch.setattr(ray_pool, "PLACE_LIMIT_S", 3.0)
    try:
        victim = grid.pids()[0]
        lost = node_with(cluster, grid, victim)
        for node in [n for n in cluster.worker_nodes if n is not lost]:
            cluster.remove_node(node, False)
        start = time.monotonic()
        with (
            in_mid_round(tmp_path, victim, partial(cluster.remove_node, lost, False)),
            pytest.raises(UserError, match=r"no Ray worker is left and none could be started"),
        ):
            federate(grid, 2)
        assert time.monotonic() - start < 60
    finally:
        grid.close()


def test_more_workers_than_there_is_room_for(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pool, "PLACE_LIMIT_S", 20.0)
    with pytest.raises(UserError, match=r"1 of 3 Ray workers did not start within 20 s; is there"):
        open_on(cluster, tmp_path, workers=3)
