"""Secure aggregation on nodes equals the simulation, in one process and in real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from safetensors.torch import load_file

from fedprompt.config.protection import SecureAggregationConfig
from fedprompt.config.schema import Config, to_yaml
from fedprompt.deploy import node
from fedprompt.deploy.node import answer
from fedprompt.deploy.sum_log import FILE
from fedprompt.deploy.worker import answer_one, listen
from fedprompt.deploy.worker_client import ask_worker
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import run as experiment
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.federation.server_app import Federation
from fedprompt.messages import (
    become_server,
    client_of,
    from_wire,
    records_from_wire,
    records_to_wire,
    to_record,
    to_wire,
)
from fedprompt.privacy.secure_aggregation import COLLECT, RECORD, SETUP, STAGE, flower, stage_of
from fedprompt.privacy.secure_aggregation.params import Terms
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.workspace import Workspace
from tests.support.federations import config_for, needs_processes, write_clients

ON = SecureAggregationConfig(enabled=True, max_weight=100)


def masked_config(folder: Path) -> Config:
    config = config_for(folder / "images", folder / "run", rounds=2, evaluation={"every": 1})
    return replace(config, secure_aggregation=ON)


def node_settings(folder: Path, client: int) -> tuple[dict[str, Any], dict[str, Any]]:
    images = folder / "images"
    text = to_yaml(masked_config(folder)).replace(str(images), "/not/here")
    node = {"partition-id": client, "data": str(images / f"client-{client}"), "device": "cpu"}
    return node | {"state-dir": str(folder / f"state-{client}")}, {"config": text, "run": "r"}


def ask(kind: str, content: RecordDict) -> Message:
    become_server()
    message = Message(content, dst_node_id=5, message_type=kind)
    message.metadata.__dict__["_message_id"] = "m"
    return message


def setup() -> RecordDict:
    terms = Terms.of(ON, 3).setup()
    return RecordDict({RECORD: ConfigRecord({STAGE: SETUP, **terms})})


class NodesHere(InlineGrid):
    """A grid whose messages `node.answer` answers; each node's state is stored as bytes."""

    folder: Path

    def __init__(self, workspace: Workspace, folder: Path) -> None:
        super().__init__(workspace)
        self.folder = folder
        self.stored: dict[int, bytes] = {}

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = []
        for number, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"m{number}"
            client = client_of(message.metadata.dst_node_id)
            state = records_from_wire(self.stored.get(client, b""))
            asked = from_wire(to_wire(message))
            reply = answer(asked, *node_settings(self.folder, client), 7, state)
            self.stored[client] = records_to_wire(state)
            replies.append(from_wire(to_wire(reply)))
        return replies


def test_nodes_equal_the_simulation_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A node has one workspace; here three nodes share a process.
    monkeypatch.setattr(node, "_opened", lru_cache(maxsize=3)(node._opened.__wrapped__))
    write_clients(tmp_path / "images")
    config = masked_config(tmp_path)
    workspace = open_workspace(config)
    shared = []
    for grid in (NodesHere(workspace, tmp_path), InlineGrid(workspace)):
        federation = Federation(workspace, grid)
        federation.join()
        line = federation.train_round(1)
        assert line["clients"]["accepted"] == 3, line
        shared.append({n: t.numpy().tobytes() for n, t in federation.shared.items()})
        if isinstance(grid, NodesHere):
            assert set(grid.stored.values()) == {b""}, "keys are deleted at the end of the round"
    assert shared[0] == shared[1]
    for client in range(3):  # private prompts are stored in the training stage
        state = tmp_path / f"state-{client}"
        assert [p.name for p in state.rglob("round-*.safetensors")] == ["round-000001.safetensors"]
        (sums,) = state.rglob(FILE)
        assert len(json.loads(sums.read_text())) == 1, "the sum is remembered beyond the round"


def test_a_node_never_sends_an_unmasked_update(tmp_path: Path) -> None:
    write_clients(tmp_path / "images")
    workspace = open_workspace(masked_config(tmp_path))
    start = to_record({n: t.numpy() for n, t in workspace.method.init_shared(3).items()})
    settings = ConfigRecord({"server-round": 1})
    plain = RecordDict({"arrays": start, "config": settings})
    state = RecordDict()
    reply = answer(ask(MessageType.TRAIN, plain), *node_settings(tmp_path, 1), 7, state)
    assert reply.has_error()
    late = {STAGE: COLLECT, "ctxts": [b""], "srcs": [6]}
    restarted = RecordDict({**plain, RECORD: ConfigRecord(late)})
    reply = answer(ask(MessageType.TRAIN, restarted), *node_settings(tmp_path, 1), 7, RecordDict())
    assert reply.has_error()
    assert not list((tmp_path / "state-1").rglob("*.safetensors")), "nothing was trained"


def test_the_worker_returns_the_nodes_state(tmp_path: Path) -> None:
    write_clients(tmp_path / "images")
    with tempfile.TemporaryDirectory(prefix="fp") as short:
        path = Path(short) / "worker.sock"
        with listen(path) as listener:

            def serve() -> None:
                line, _ = listener.accept()
                with line:
                    answer_one(line)

            threading.Thread(target=serve, daemon=True).start()
            state = RecordDict()
            asked = ask(MessageType.TRAIN, setup())
            reply = ask_worker(str(path), asked, *node_settings(tmp_path, 1), 7, state)
    assert not reply.has_error(), reply.error
    assert stage_of(asked) == SETUP
    stored = flower.SecAggPlusState(**state.config_records[flower.RECORD_KEY_STATE])
    assert reply.content.config_records[RECORD]["pk1"] == stored.pk1
    assert stored.sk1.startswith(b"-----BEGIN PRIVATE KEY")
    assert b"PRIVATE" not in to_wire(reply)


def lines_of(run: Path) -> Sequence[dict[str, Any]]:
    return [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_processes
def test_deploy_local_equals_the_simulation(tmp_path: Path) -> None:
    write_clients(tmp_path / "images")
    config = masked_config(tmp_path)
    (tmp_path / "experiment.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "fedprompt", "deploy", "local"]
    command += [str(tmp_path / "experiment.yaml"), "--folder", str(tmp_path / "f")]
    finished = subprocess.run(
        command, env={**os.environ}, capture_output=True, text=True, timeout=800
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    twin = experiment(
        replace(config, output=replace(config.output, dir=str(tmp_path / "twin"))), QuietDisplay()
    )
    ours, theirs = lines_of(tmp_path / "run"), lines_of(twin)
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        for part in ("train", "clients", "secure", "global"):
            assert a.get(part) == b.get(part), (a["round"], part)
    assert [line["secure"] for line in ours[1:]] == [{"clipped": 0}] * 2
    shared, expected = (load_file(p / "prompts.safetensors") for p in (tmp_path / "run", twin))
    for name, tensor in shared.items():
        assert tensor.numpy().tobytes() == expected[name].numpy().tobytes(), name
    secret = [
        p for p in (tmp_path / "run").rglob("*")
        if p.is_file() and b"PRIVATE KEY" in p.read_bytes()
    ]  # fmt: skip
    assert secret == []
