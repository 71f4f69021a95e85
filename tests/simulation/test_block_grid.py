"""The inline grid: the same numbers whatever the blocks or the order of replies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MessageType
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from fedprompt.federation.client_app import handle
from fedprompt.federation.server_app import Federation
from fedprompt.messages import client_of, node_of
from fedprompt.methods.base import Tensors, uploaded_numbers
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.workspace import Workspace
from tests.support.grids import assert_same, federate, introduce, private_tensors, queries

MakeWorkspace = Callable[..., Workspace]


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
        assert private_tensors(grid)["clients"].tolist() == trained
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
    messages = list(federation.strategy.configure_train(1, federation.arrays, ConfigRecord(), grid))
    replies = list(grid.send_and_receive(messages))
    for reply in replies:
        reply.content["arrays"].clear()  # type: ignore[attr-defined]
    assert torch.equal(federation.shared["ctx"], before)


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
