"""A node's answers, in this process and through its warm worker."""

from __future__ import annotations

import logging
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from fedprompt.config.schema import to_yaml
from fedprompt.deploy import worker_client as carrier
from fedprompt.deploy.folders import NodeSite
from fedprompt.deploy.node import answer
from fedprompt.deploy.node_report import Description, from_reply
from fedprompt.deploy.worker import listen, serve_one
from fedprompt.deploy.worker_client import WorkerAway, carry
from fedprompt.errors import UserError
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.messages import become_server, to_record, to_wire
from fedprompt.methods.registry import method_class
from tests.support.fake_data import truncated
from tests.support.federations import CLASSES, config_for, write_clients


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_clients(tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="fp") as folder:
        yield Path(folder)


def settings(images: Path, client: int = 1, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A node's settings, and the run config of an experiment that knows no folder."""
    config = config_for(images, Path("run"))
    text = to_yaml(config).replace(str(images), "/not/here")
    node = {"partition-id": client, "data": str(images / f"client-{client}"), "device": "cpu"}
    return node | {"state-dir": str(images.parent / "state")} | more, {"config": text, "run": "r"}


def message(kind: str, server_round: int = 1, arrays: Any = None) -> Message:
    become_server()
    content = RecordDict({"config": ConfigRecord({"server-round": server_round})})
    if arrays is not None:
        content["arrays"] = arrays
    sent = Message(content, dst_node_id=5, message_type=kind)
    sent.metadata.__dict__["_message_id"] = "m"
    return sent


def start_of(images: Path) -> Any:
    config = config_for(images, Path("run"))
    workspace = open_workspace(config)
    start = method_class("fedrsclip").init_shared(workspace.method, config.seed)
    return to_record({n: t.numpy() for n, t in start.items()})


def test_a_node_says_what_it_has(images: Path) -> None:
    reply = answer(message(MessageType.QUERY), *settings(images), 7)
    found = from_reply(reply, len(CLASSES), 3)
    assert isinstance(found, Description)
    assert found.client == 1
    assert [a + b for a, b in zip(found.train_C, found.test_C, strict=True)] == [9, 10, 11, 12]


def test_a_folder_that_is_wrong_is_one_line_on_both_sides(
    images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("fedprompt").handlers.clear()
    (images / "client-1" / "beach" / "bad.jpg").write_bytes(truncated())
    reply = answer(message(MessageType.QUERY), *settings(images), 7)
    said = from_reply(reply, len(CLASSES), 3)
    assert isinstance(said, str)
    assert "cannot read <data>/beach/bad.jpg" in said
    assert str(images) not in said, "where a node's images lie is its own business"
    here = capfd.readouterr().err
    assert f"this node cannot take part: data: cannot read {images}/client-1/beach/bad.jpg" in here
    assert "Traceback" not in here
    (images / "client-1" / "beach" / "bad.jpg").unlink()
    (images / "client-1" / "glacier").mkdir()
    reply = answer(message(MessageType.TRAIN, 1), *settings(images), 7)
    assert reply.has_error()
    assert "has a class 'glacier' that is not in data.class_names" in str(reply.error.reason)


def test_weights_that_the_experiment_names_are_not_the_nodes(
    images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("fedprompt").handlers.clear()
    config = config_for(images, Path("run"), backbone={"checkpoint": "/server/weights.pt"})
    node, run = settings(images)
    run["config"] = to_yaml(config)
    said = from_reply(answer(message(MessageType.QUERY), node, run, 7), len(CLASSES), 3)
    line = "the experiment's weights are a file of the server's (backbone.checkpoint)"
    assert isinstance(said, str)
    assert line in said
    here = capfd.readouterr().err
    assert f"this node cannot take part: {line}" in here
    assert here.count("\n") == 1
    own = settings(images, checkpoint=str(images / "weights.pt"))[0]
    reply = answer(message(MessageType.QUERY), own, run, 7)
    assert isinstance(from_reply(reply, len(CLASSES), 3), Description)


def test_a_node_that_requires_more_protection_says_nothing_of_its_data(images: Path) -> None:
    node, run = settings(images, **{"require-secure-aggregation": True})
    line = "secure aggregation is required here"
    said = from_reply(answer(message(MessageType.QUERY), node, run, 7), len(CLASSES), 3)
    assert isinstance(said, str)
    assert line in said
    reply = answer(message(MessageType.TRAIN, 1, start_of(images)), node, run, 7)
    assert reply.has_error()
    assert line in str(reply.error.reason)
    assert not (images.parent / "state").exists()


def test_the_worker_answers_as_the_process_itself(images: Path, short: Path) -> None:
    shared = start_of(images)
    path = short / "worker.sock"
    with listen(path) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

        def serve() -> None:
            for _ in range(3):
                line, _ = listener.accept()
                with line:
                    serve_one(line)

        threading.Thread(target=serve, daemon=True).start()
        for kind in (MessageType.QUERY, MessageType.TRAIN, MessageType.EVALUATE):
            asked = message(kind, 1, shared)
            own = answer(asked, *settings(images, **{"state-dir": str(short / "own")}), 7)
            node, run = settings(images, **{"state-dir": str(short / "worker")})
            theirs = carry(str(path), asked, node, run, 7)
            assert not own.has_error(), own.error
            assert own.content == theirs.content
    kept = [sorted(p.name for p in (short / d).rglob("*.safetensors")) for d in ("own", "worker")]
    assert kept[0] == kept[1] == ["round-000001.safetensors"]


def test_no_worker_and_one_that_dies(short: Path) -> None:
    asked = message(MessageType.QUERY)
    with pytest.raises(WorkerAway):
        carry(str(short / "none.sock"), asked, {}, {}, 7, patience=0.5)
    path = short / "worker.sock"
    with listen(path) as listener:

        def die() -> None:
            line, _ = listener.accept()
            carrier.receive(line)
            line.close()

        threading.Thread(target=die, daemon=True).start()
        reply = carry(str(path), asked, {}, {}, 7)
    assert reply.has_error()
    assert "the node's worker ended over this message" in str(reply.error.reason)


def test_a_message_that_breaks_the_worker_is_an_error_reply(short: Path) -> None:
    """It goes on with the next one."""
    asked = message(MessageType.TRAIN)
    near, far = socket.socketpair()
    with near, far:
        carrier.send(near, b'{"node_config": 3, "run_config": {}, "run_id": 7}')
        carrier.send(near, to_wire(asked))
        carrier.send(near, b"")  # nothing is kept for secure aggregation
        serve_one(far)
        assert b"TypeError" in carrier.receive(near)


def test_a_deep_folder_has_its_socket_elsewhere(tmp_path: Path, short: Path) -> None:
    assert NodeSite(short, "s:1", 0).worker_socket == short / "worker.sock"
    deep = [NodeSite(tmp_path / ("x" * 120) / name, "s:1", 0).worker_socket for name in "ab"]
    assert deep[0] != deep[1]
    assert all(len(str(path)) < 100 for path in deep)
    with listen(deep[0]):
        assert stat.S_IMODE(deep[0].parent.stat().st_mode) == 0o700
    deep[0].unlink()


def test_what_cannot_be_a_socket_is_one_line(short: Path) -> None:
    (short / "file").write_text("")
    with pytest.raises(UserError, match="cannot listen on"):
        listen(short / "file" / "worker.sock")


def test_carrying_a_message_loads_no_pytorch() -> None:
    code = "import sys, fedprompt.deploy.client_app; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
