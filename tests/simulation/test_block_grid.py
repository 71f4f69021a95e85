"""Grids: same numbers whatever the block, the worker or the order; nothing private on the wire."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import ray
import torch
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

import fedprompt.simulation.inline_grid as grid_module
import fedprompt.simulation.ray_grid as ray_grid_module
from fedprompt.config.schema import Config
from fedprompt.errors import UserError
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.federation.client_app import handle
from fedprompt.federation.server_app import Federation
from fedprompt.messages import client_of, from_wire, node_of, to_wire
from fedprompt.methods.base import Tensors, uploaded_numbers
from fedprompt.simulation.grids import open_grid
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.simulation.ray_grid import RayGrid
from fedprompt.workspace import Workspace
from tests.support.builders import small_config

MakeWorkspace = Callable[..., Workspace]


def federate(grid: Any, rounds: int = 3) -> tuple[Tensors, Tensors, list[dict[str, Any]]]:
    """Shared tensors, packed private tensors and metrics after some rounds."""
    federation = Federation(grid.workspace, grid)
    federation.join()
    lines = []
    for server_round in range(1, rounds + 1):
        lines.append(federation.train_round(server_round) | federation.evaluate(server_round))
    return federation.shared, grid.private.pack(), lines


def assert_same(
    first: tuple[Tensors, Tensors, Any], second: tuple[Tensors, Tensors, Any], rtol: float
) -> None:
    """Bitwise for rtol = 0, else relative to the largest value."""
    for a, b in zip(first[:2], second[:2], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if rtol == 0:
                assert torch.equal(a[name], b[name]), name
            else:
                gap = (a[name].double() - b[name].double()).abs().max()
                assert gap <= rtol * b[name].double().abs().max(), name
    if rtol == 0:
        assert first[2] == second[2]


# Inline


@pytest.mark.parametrize("method", ["fedrsclip", "promptfl", "coop_local"])
@pytest.mark.parametrize("clients_per_block", [1, 2, 3])
def test_clients_per_block_changes_rounding_only(
    make_workspace: MakeWorkspace, method: str, clients_per_block: int
) -> None:
    def outcome(size: int) -> tuple[Tensors, Tensors, Any]:
        workspace = make_workspace(
            method={"name": method}, simulation={"clients_per_block": size, "threads": 1}
        )
        return federate(InlineGrid(workspace))

    whole = outcome(4)
    assert_same(outcome(4), whole, rtol=0)
    assert_same(outcome(clients_per_block), whole, rtol=1e-5)


def test_order_of_replies_never_matters(make_workspace: MakeWorkspace) -> None:
    class Shuffled(InlineGrid):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            return list(super().send_and_receive(messages, timeout=timeout))[::-1]

    config: dict[str, Any] = {"simulation": {"clients_per_block": 2, "threads": 1}}
    straight = federate(InlineGrid(make_workspace(**config)))
    assert_same(federate(Shuffled(make_workspace(**config))), straight, rtol=0)


def test_partial_participation_is_seeded_and_keeps_other_clients(
    make_workspace: MakeWorkspace,
) -> None:
    federation_config = {"rounds": 4, "fraction": 0.5}

    def sampled(seed: int) -> list[list[int]]:
        grid = InlineGrid(make_workspace(seed=seed, federation=federation_config))
        federation = Federation(grid.workspace, grid)
        federation.join()
        drawn = []
        for server_round in range(1, 5):
            federation.train_round(server_round)
            drawn.append(federation.strategy.sampled)
        trained = sorted({c for clients in drawn for c in clients})
        assert grid.private.pack()["clients"].tolist() == trained
        return drawn

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)
    assert all(len(clients) == 2 for clients in sampled(1))


def test_traffic_is_counted_on_the_bytes(make_workspace: MakeWorkspace) -> None:
    grid = InlineGrid(make_workspace())
    federation = Federation(grid.workspace, grid)
    federation.join()
    line = federation.train_round(1)
    numbers = uploaded_numbers(federation.method) * 4 * 4  # float32, four clients
    for direction in ("bytes_up", "bytes_down"):
        assert numbers < line[direction] < numbers + 4 * 700


def test_a_client_that_fails_takes_no_other_along(
    make_workspace: MakeWorkspace,
) -> None:
    def faulty(workspace: Any, clients: Sequence[int], *rest: Any) -> Any:
        if 2 in clients and rest[0][0].metadata.message_type == MessageType.TRAIN:
            raise RuntimeError("disk\nfull")
        return handle(workspace, clients, *rest)

    grid = InlineGrid(make_workspace(), answer=faulty)
    federation = Federation(grid.workspace, grid)
    federation.join()
    line = federation.train_round(1)
    assert line["clients"] == {"sampled": 4, "accepted": 3, "rejected": 1}
    assert federation.strategy.rejected == {2: "RuntimeError: disk full"}
    assert grid.private.get(2) is None
    assert grid.private.get(3) is not None


def test_clients_are_told_when_the_server_runs_another_experiment(
    make_workspace: MakeWorkspace,
) -> None:
    grid = InlineGrid(make_workspace())
    federation = Federation(grid.workspace, grid)
    federation.join()
    federation.arrays = ArrayRecord({"ctx": Array(np.zeros((5, 64), np.float32))})
    federation.train_round(1)
    assert "same experiment" in federation.strategy.rejected[0]


def test_messages_are_copied_as_a_network_would(make_workspace: MakeWorkspace) -> None:
    grid = InlineGrid(make_workspace())
    federation = Federation(grid.workspace, grid)
    federation.join()
    before = federation.shared["ctx"].clone()
    messages = list(federation.strategy.configure_train(1, federation.arrays, _no_config(), grid))
    replies = list(grid.send_and_receive(messages))
    for reply in replies:
        reply.content["arrays"].clear()  # type: ignore[attr-defined]
    assert torch.equal(federation.shared["ctx"], before)


def introduce(
    workspace: Any, clients: Sequence[int], messages: Sequence[Message], private: Any
) -> tuple[list[Message], dict[int, Tensors]]:
    """Clients that say who they are, whatever they are asked."""
    del workspace, private
    return [
        Message(RecordDict({"metrics": MetricRecord({"client": c})}), reply_to=m)
        for c, m in zip(clients, messages, strict=True)
    ], {}


def queries(clients: Sequence[int]) -> list[Message]:
    """One message per client that asks who it is."""
    return [
        Message(RecordDict(), dst_node_id=node_of(c), message_type=MessageType.QUERY)
        for c in clients
    ]


def test_push_and_pull(make_workspace: MakeWorkspace) -> None:
    grid = InlineGrid(make_workspace(), answer=introduce)
    assert list(grid.get_node_ids()) == [node_of(c) for c in range(4)]
    ids = list(grid.push_messages(queries(range(4))))
    replies = list(grid.pull_messages(ids))
    assert [client_of(r.metadata.src_node_id) for r in replies] == [0, 1, 2, 3]
    assert [r.content["metrics"]["client"] for r in replies] == [0, 1, 2, 3]
    assert list(grid.pull_messages(ids)) == []


def test_what_a_client_does_not_know_it_does_not_answer(make_workspace: MakeWorkspace) -> None:
    grid = InlineGrid(make_workspace())
    (reply,) = grid.send_and_receive(queries([1]))
    assert "do not answer messages of type 'query'" in str(reply.error.reason)


def test_flowers_own_fedavg_runs_on_our_grid(make_workspace: MakeWorkspace) -> None:
    """Unmodified Flower strategy, same result as ours up to its float32 sums."""
    workspace = make_workspace(method={"name": "promptfl", "context_tokens": 4})
    ours, _, _ = federate(InlineGrid(workspace))
    grid = InlineGrid(workspace)
    start = workspace.method.init_shared(1)
    result = FlowerFedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=4).start(
        grid=grid,
        initial_arrays=ArrayRecord({n: Array(t.numpy()) for n, t in start.items()}),
        num_rounds=3,
    )
    theirs = torch.from_numpy(result.arrays["ctx"].numpy())
    assert (ours["ctx"] - theirs).abs().max() <= 1e-5 * theirs.abs().max()


# What leaves a client

PICKLED = b"cos\nsystem\n(S'true'\ntR."


def _no_config() -> Any:
    from flwr.app import ConfigRecord

    return ConfigRecord()


def leaks(wire: bytes, private: Tensors, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Everything in a reply that should not be there: undeclared content, or private values."""
    found = []
    message = from_wire(wire)
    if set(message.content) - {"arrays", "metrics"}:
        found.append("undeclared record")
    arrays = message.content["arrays"]
    if {n: tuple(a.shape) for n, a in arrays.items()} != shapes:  # type: ignore[union-attr]
        found.append("undeclared tensor")
    if any(isinstance(v, list) for v in message.content["metrics"].values()):
        found.append("metric that is a list")
    for name, tensor in private.items():
        values = tensor.numpy().ravel()
        for dtype in (np.float64, np.float32, np.float16):
            raw = values.astype(dtype).tobytes()
            step = 4 * np.dtype(dtype).itemsize  # four consecutive values in any encoding
            pieces = (raw[i : i + step] for i in range(0, len(raw) - step + 1, step))
            if any(piece in wire for piece in pieces):
                found.append(f"values of private '{name}'")
                break
    return found


def _wires(
    grid: InlineGrid, monkeypatch: pytest.MonkeyPatch, rounds: int = 2
) -> list[tuple[int, bytes]]:
    """Every train reply as bytes, with the client that sent it."""
    seen: list[tuple[int, bytes]] = []
    run_block = grid_module.run_block

    def recording(workspace: Any, block: Any, private: Any, answer: Any) -> Any:
        replies, changed = run_block(workspace, block, private, answer)
        if from_wire(replies[0]).metadata.message_type == MessageType.TRAIN:
            seen.extend((p.client, r) for p, r in zip(block, replies, strict=True))
        return replies, changed

    monkeypatch.setattr(grid_module, "run_block", recording)
    federate(grid, rounds)
    return seen


@pytest.mark.parametrize("composition", ["two_branch", "concat", "sum"])
def test_only_declared_shared_tensors_leave_a_client(
    make_workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch, composition: str
) -> None:
    workspace = make_workspace(method={"name": "fedrsclip", "composition": composition})
    grid = InlineGrid(workspace)
    shapes = {n: tuple(t.shape) for n, t in workspace.method.init_shared(1).items()}
    wires = _wires(grid, monkeypatch)
    assert len(wires) == 8
    for client, wire in wires[-4:]:
        private = grid.private.get(client)
        assert private is not None
        assert leaks(wire, private, shapes) == []


def _as_tensor(reply: Message, private: Tensors) -> None:
    reply.content["arrays"]["extra"] = Array(private["ctx"].numpy())  # type: ignore[index]


def _as_rows(reply: Message, private: Tensors) -> None:
    both = np.concatenate([reply.content["arrays"]["ctx"].numpy(), private["ctx"].numpy()])  # type: ignore[index]
    reply.content["arrays"] = ArrayRecord({"ctx": Array(both)})


def _as_metric(reply: Message, private: Tensors) -> None:
    reply.content["metrics"]["loss-list"] = private["ctx"].ravel().tolist()  # type: ignore[index]


def _as_record(reply: Message, private: Tensors) -> None:
    reply.content["more"] = MetricRecord({"values": private["ctx"].ravel().tolist()})


def _in_place_of_shared(reply: Message, private: Tensors) -> None:
    reply.content["arrays"] = ArrayRecord({"ctx": Array(private["ctx"].numpy())})


@pytest.mark.parametrize(
    "plant", [_as_tensor, _as_rows, _as_metric, _as_record, _in_place_of_shared]
)
def test_a_planted_leak_is_caught(
    make_workspace: MakeWorkspace,
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[Message, Tensors], None],
) -> None:
    def leaking(workspace: Any, clients: Any, messages: Any, private: Any) -> Any:
        replies, changed = handle(workspace, clients, messages, private)
        for client, reply in zip(clients, replies, strict=True):
            if client in changed:
                plant(reply, changed[client])
        return replies, changed

    workspace = make_workspace()
    grid = InlineGrid(workspace, answer=leaking)
    shapes = {n: tuple(t.shape) for n, t in workspace.method.init_shared(1).items()}
    for client, wire in _wires(grid, monkeypatch, rounds=1):
        private = grid.private.get(client)
        assert private is not None
        assert leaks(wire, private, shapes)


def test_wire_format_is_data_only(make_workspace: MakeWorkspace) -> None:
    """A pickled payload inside a tensor is refused, not executed."""
    payload = Array(dtype="float32", shape=(1,), stype="numpy.ndarray", data=PICKLED)
    message = Message(
        RecordDict({"arrays": ArrayRecord({"ctx": payload})}),
        dst_node_id=node_of(0),
        message_type=MessageType.TRAIN,
    )
    with pytest.raises(ValueError, match="pickle"):
        from_wire(to_wire(message)).content["arrays"]["ctx"].numpy()  # type: ignore[index]


# Ray


def scenes(**sections: Any) -> Config:
    """A real workspace that worker processes can open themselves."""
    base: dict[str, Any] = {
        "data": {
            "images_per_class": 4,
            "domains": ["savanna"],
            "templates": ["a photo of a {}."],
        },
        "partition": {"clients": 5, "scheme": "iid"},
        "simulation": {"kind": "ray", "workers": 2, "threads": 1, "clients_per_block": 2},
        "federation": {"rounds": 2},
    }
    for key, value in sections.items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    return small_config(**base)


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


def wait_for_workers(grid: RayGrid) -> None:
    """Until all of them are up: it is seen when clients are asked."""
    federation = Federation(grid.workspace, grid)
    federation.join()
    deadline = time.monotonic() + 60
    while not all(slot.free for slot in grid._slots):
        assert time.monotonic() < deadline
        federation.evaluate(0)


def test_ray_equals_inline_bit_for_bit(ray_grid: RayGrid, workspace: Workspace) -> None:
    """Same block size, same thread count, other processes."""
    inline = federate(InlineGrid(workspace), 2)
    assert_same(federate(_fresh(ray_grid, workspace), 2), inline, rtol=0)


def test_ray_takes_another_method_without_a_restart(
    ray_grid: RayGrid, workspace: Workspace
) -> None:
    from fedprompt.methods.registry import method_class

    pids = ray_grid.pids()
    other = workspace.with_method(method_class("coop_local").Config(context_tokens=4))
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
    messages = list(federation.strategy.configure_train(1, federation.arrays, _no_config(), grid))
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

    monkeypatch.setattr(ray_grid_module.ray, "init", refuse)
    with pytest.raises(UserError, match=r"cannot start or join Ray on 127.0.0.1:1: could not conn"):
        ray_grid_module.start_ray(config.simulation)
