"""A port that another program uses is reported before any process is started."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprompt.deploy.folders import SETTINGS, read_node_folder, read_server_folder
from fedprompt.deploy.new_federation import create_federation
from fedprompt.deploy.processes import free_port
from fedprompt.deploy.supervise import run_node, serve
from fedprompt.errors import UserError


@pytest.fixture
def used_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield int(other.getsockname()[1])


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    create_federation(tmp_path / "federation", ["127.0.0.1"], 1, free_port(), 30)
    return tmp_path / "federation"


@pytest.mark.parametrize(
    ("which", "advice"),
    [("port", "--port PORT"), ("superlink_port", "superlink_port")],
)
def test_a_server_refuses_a_used_port(
    federation: Path, used_port: int, which: str, advice: str
) -> None:
    settings = federation / "server" / SETTINGS
    ports = {"port": free_port(), "superlink_port": free_port(), which: used_port}
    settings.write_text(json.dumps(ports))
    with pytest.raises(UserError, match=f"port {used_port} .*{advice}"):
        serve(read_server_folder(federation / "server"), "127.0.0.1")
    assert not list((federation / "server" / "logs").glob("*.log"))


def test_a_node_refuses_a_used_port(federation: Path, used_port: int) -> None:
    with pytest.raises(UserError, match=f"port {used_port} "):
        run_node(read_node_folder(federation / "node-0"), {}, used_port)
