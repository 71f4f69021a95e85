"""Ray workers in processes of their own: the numbers of the inline grid, also after a fault."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import ray
from flwr.app import ConfigRecord

from fedprompt.errors import UserError
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.federation.server_app import Federation
from fedprompt.simulation import ray_cluster
from fedprompt.simulation.grids import open_grid
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.simulation.ray_grid import RayGrid
from fedprompt.workspace import Workspace
from tests.support.grids import assert_same, federate, scenes, wait_for_workers


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def workspace(ray_session: None) -> Workspace:
    return open_workspace(scenes())


@pytest.fixture(scope="module")
def ray_grid(workspace: Workspace) -> Iterator[RayGrid]:
    grid = open_grid(workspace.config, workspace, open_workspace)
    assert isinstance(grid, RayGrid)
    yield grid
    grid.close()


def _fresh(grid: RayGrid, workspace: Workspace) -> RayGrid:
    """No private tensors yet, and all workers up."""
    grid.use(workspace)
    wait_for_workers(grid)
    return grid


def test_ray_equals_inline_bit_for_bit(ray_grid: RayGrid, workspace: Workspace) -> None:
    """Same block size, same thread count, other processes."""
    inline = federate(InlineGrid(workspace), 2)
    assert_same(federate(_fresh(ray_grid, workspace), 2), inline, rtol=0)


def test_ray_takes_another_method_and_training_without_a_restart(
    ray_grid: RayGrid, workspace: Workspace
) -> None:
    from fedprompt.methods.registry import method_class

    pids = ray_grid.pids()
    # Another learning rate too, as the local-only baseline may have.
    training = replace(workspace.config.training, lr=2 * workspace.config.training.lr)
    other = workspace.with_method(method_class("coop_local").Config(context_tokens=4), training)
    inline = federate(InlineGrid(other), 2)
    assert_same(federate(_fresh(ray_grid, other), 2), inline, rtol=0)
    assert ray_grid.pids() == pids


def test_a_killed_worker_is_replaced_and_nothing_is_lost(
    ray_grid: RayGrid, workspace: Workspace
) -> None:
    inline = federate(InlineGrid(workspace), 2)
    grid = _fresh(ray_grid, workspace)
    victim = grid.pids()[0]
    os.kill(victim, signal.SIGKILL)
    assert_same(federate(grid, 2), inline, rtol=0)
    assert victim not in grid.pids()


@pytest.mark.slow
def test_a_block_over_its_time_limit_is_left_out(ray_grid: RayGrid, workspace: Workspace) -> None:
    """A worker that hangs is killed; its clients are named and the others count."""
    grid = _fresh(ray_grid, workspace)
    federation = Federation(workspace, grid)
    federation.join()
    os.kill(grid.pids()[0], signal.SIGSTOP)
    messages = list(federation.strategy.configure_train(1, federation.arrays, ConfigRecord(), grid))
    start = time.monotonic()
    # Long enough for the worker that answers, on a busy machine too.
    replies = list(grid.send_and_receive(messages, timeout=20))
    assert time.monotonic() - start < 90
    _, metrics = federation.strategy.aggregate_train(1, replies)
    assert metrics is not None
    assert metrics["accepted"] == 3
    assert sorted(federation.strategy.rejected.values()) == ["time limit exceeded"] * 2
    assert_same(federate(_fresh(grid, workspace), 2), federate(InlineGrid(workspace), 2), rtol=0)


def test_joining_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    config = scenes(simulation={"ray_address": "127.0.0.1:1"})

    def refuse(**_: Any) -> None:
        raise ConnectionError("could not\nconnect")

    monkeypatch.setattr(ray_cluster.ray, "init", refuse)
    with pytest.raises(UserError, match=r"cannot start or join Ray on 127.0.0.1:1: could not conn"):
        ray_cluster.start_ray(config.simulation)
