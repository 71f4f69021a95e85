"""Who is refused, and which bytes are not accepted as data."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from google.protobuf.message import DecodeError

from fedprompt.config.schema import to_yaml
from fedprompt.deploy.credentials import write_authority, write_node_key
from fedprompt.deploy.node import answer
from fedprompt.deploy.private_store import FileStore
from fedprompt.errors import UserError
from fedprompt.experiment.checkpoint import read_checkpoint
from fedprompt.federation.screening import Limits, read_training
from fedprompt.messages import Refused, become_server, from_wire
from tests.support import ROOT
from tests.support.builders import small_config
from tests.support.federations import config_for, federation, needs_processes, write_clients


class Bomb:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.flag),)


@pytest.fixture
def flag(tmp_path: Path) -> Path:
    return tmp_path / "opened"


def pickled_array(flag: Path) -> bytes:
    """A .npy file whose content is a pickle, which NumPy loads only if it is told to."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb(flag)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def test_the_pickle_does_harm_when_it_is_loaded(flag: Path) -> None:
    np.load(io.BytesIO(pickled_array(flag)), allow_pickle=True)
    assert flag.is_dir()


@pytest.mark.parametrize("raw", [False, True], ids=["in a .npy", "bare"])
def test_a_pickled_reply_is_refused(flag: Path, raw: bool) -> None:
    data = pickle.dumps(Bomb(flag)) if raw else pickled_array(flag)
    array = Array(dtype="float32", shape=(4, 8), stype="numpy.ndarray", data=data)
    records = {"arrays": ArrayRecord({"ctx": array}), "metrics": MetricRecord({"num-examples": 3})}
    limits = Limits({"ctx": (4, 8)}, max_norm=1e4, max_examples_ratio=10, min_replies=1)
    with pytest.raises(Refused, match="cannot be read"):
        read_training(RecordDict({**records}), limits)
    assert not flag.exists()


def test_a_server_that_sends_a_pickle_is_refused(flag: Path, tmp_path: Path) -> None:
    config = small_config(data={"images_per_class": 4, "domains": ["savanna"]},
                          partition={"clients": 2, "alpha": 10.0})  # fmt: skip
    become_server()
    shape = (4, 128)
    array = Array(dtype="float32", shape=shape, stype="numpy.ndarray", data=pickled_array(flag))
    content = {"arrays": ArrayRecord({"ctx": array}), "config": ConfigRecord({"server-round": 1})}
    message = Message(RecordDict({**content}), dst_node_id=5, message_type="train")
    message.metadata.__dict__["_message_id"] = "m"
    settings = {"partition-id": 0, "state-dir": str(tmp_path / "state")}
    reply = answer(message, settings, {"config": to_yaml(config)}, 1)
    assert "allow_pickle" in str(reply.error.reason)
    assert not flag.exists()


def test_pickles_in_files_and_on_the_wire_are_refused(flag: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(pickle.dumps(Bomb(flag)))
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(path)
    (tmp_path / "round-000001.safetensors").write_bytes(pickle.dumps(Bomb(flag)))
    with pytest.raises(UserError, match="cannot be read"):
        FileStore(tmp_path).latest(2)
    with pytest.raises(DecodeError):
        from_wire(pickle.dumps(Bomb(flag)))
    assert not flag.exists()


def test_none_of_our_modules_loads_pickles() -> None:
    root = ROOT
    code = [p for folder in ("fedprompt", "strategies") for p in (root / folder).rglob("*.py")]
    words = ("import pickle", "cloudpickle", "allow_pickle=True", "weights_only=False", "dill")
    matches = [(p.name, word) for p in code for word in words if word in p.read_text()]
    assert matches == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_processes
def test_who_is_refused(tmp_path: Path) -> None:
    write_clients(tmp_path / "images")
    config = config_for(tmp_path / "images", tmp_path / "run", clients=2, rounds=1)
    with federation(tmp_path, config, []) as running:
        local, port = running.local, running.local.server.port
        trusted = ssl.create_default_context(cafile=str(local.server.path / "ca.crt"))

        # Plain HTTP gets no answer.
        with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
            line.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200" not in line.recv(100)

        # Only the Fleet API can be reached, and it refuses callers without a key.
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusted) as client:
            for path in ("control/start-run", "control/list-nodes", "runtime/acquire-task"):
                assert client.post(f"/v1/{path}", content=b"").status_code == 404
                assert client.post(f"/v1/fleet/../{path}", content=b"").status_code == 404
            assert client.get("/docs").status_code == 404
            refused = client.post(
                "/v1/fleet/pull-messages",
                content=b"",
                headers={"content-type": "application/x-protobuf"},
            )
            assert refused.status_code in (400, 401, 415), refused.text

        # A node refuses a server whose certificate another authority has issued.
        write_authority(tmp_path / "other", 1)
        stranger = local.folder / "node-1"
        certificate = (stranger / "ca.crt").read_bytes()
        shutil.copy(tmp_path / "other" / "ca.crt", stranger / "ca.crt")
        running.start_node(1)
        log = local.processes.log("node-1")
        running.wait_for(
            lambda: (
                "CERTIFICATE_VERIFY_FAILED" in log.read_text()
                or "Connection attempt failed" in log.read_text()
            ),
            "the node's refusal",
        )
        running.kill_node(1)
        (stranger / "ca.crt").write_bytes(certificate)

        # A node whose key is not registered is refused.
        right = (stranger / "node.key").read_bytes()
        write_node_key(stranger)
        assert (stranger / "node.key").read_bytes() != right
        log.unlink()
        running.start_node(1)
        node = local.processes.running["node-1"]
        running.wait_for(lambda: node.poll() is not None, "the server's refusal")
        assert node.returncode != 0
        assert "Failed to initialize the connection" in log.read_text()
        local.processes.kill("node-1")
        local.processes.kill("worker-1")

        # A node without TLS is refused.
        command = local.node(0).supernode_command({}, 1)
        command[1:3] = ["--insecure"]
        plain = local.processes.start("plain", command, local.node(0).environment)
        words = local.processes.log("plain")
        running.wait_for(
            lambda: plain.poll() is not None or "failed" in words.read_text().lower(), "its failure"
        )
        assert "SuperNode ID" not in words.read_text()
        local.processes.kill("plain")

        # The node with the right key joins; the others never did.
        running.start_node(0)
        running.begin()
        running.wait_for(lambda: "client 0 has joined" in running.log(), "the right node")
        assert "client 1" not in running.log()
