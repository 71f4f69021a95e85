"""What leaves a client: the declared shared tensors and nothing private, read from the bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict

import fedprompt.simulation.inline_grid as grid_module
from fedprompt.federation.client_app import handle
from fedprompt.messages import from_wire, node_of, to_wire
from fedprompt.methods.base import Tensors
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.workspace import Workspace
from tests.support.grids import federate

MakeWorkspace = Callable[..., Workspace]


PICKLED = b"cos\nsystem\n(S'true'\ntR."


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

    def recording(workspace: Any, block: Any, private: Any, answer: Any, **options: Any) -> Any:
        answered = run_block(workspace, block, private, answer, **options)
        if from_wire(answered.replies[0]).metadata.message_type == MessageType.TRAIN:
            seen.extend((p.client, r) for p, r in zip(block, answered.replies, strict=True))
        return answered

    monkeypatch.setattr(grid_module, "run_block", recording)
    federate(grid, rounds)
    return seen


@pytest.mark.parametrize("composition", ["two_branch", "concat", "sum"])
@pytest.mark.parametrize("momentum_state", ["reset", "keep"])
def test_only_declared_shared_tensors_leave_a_client(
    make_workspace: MakeWorkspace,
    monkeypatch: pytest.MonkeyPatch,
    composition: str,
    momentum_state: str,
) -> None:
    workspace = make_workspace(
        method={"name": "fedrsclip", "composition": composition},
        training={"momentum_state": momentum_state},
    )
    grid = InlineGrid(workspace)
    shapes = {n: tuple(t.shape) for n, t in workspace.method.init_shared(1).items()}
    wires = _wires(grid, monkeypatch)
    assert len(wires) == 8
    for client, wire in wires[-4:]:
        private = grid.private.get(client)
        assert private is not None
        assert ("momentum/shared.ctx" in private) == (momentum_state == "keep")
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
