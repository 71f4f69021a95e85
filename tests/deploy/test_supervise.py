"""Ports that another program has are said before anything is started."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprompt.deploy.folders import SETTINGS, init, read_node_site, read_server
from fedprompt.deploy.processes import free_port
from fedprompt.deploy.supervise import run_node, serve
from fedprompt.errors import UserError


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield int(other.getsockname()[1])


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    init(tmp_path / "federation", ["127.0.0.1"], 1, free_port(), 30)
    return tmp_path / "federation"


@pytest.mark.parametrize(
    ("which", "advice"),
    [("port", "set --port PORT"), ("superlink_port", "set superlink_port in")],
)
def test_a_server_refuses_a_taken_port(
    federation: Path, taken: int, which: str, advice: str
) -> None:
    settings = federation / "server" / SETTINGS
    ports = {"port": free_port(), "superlink_port": free_port(), which: taken}
    settings.write_text(json.dumps(ports))
    with pytest.raises(UserError, match=f"port {taken} of this machine is taken.*{advice}"):
        serve(read_server(federation / "server"), "127.0.0.1")
    assert not list((federation / "server" / "logs").glob("*.log"))


def test_a_node_refuses_a_taken_port(federation: Path, taken: int) -> None:
    with pytest.raises(UserError, match=f"port {taken} of this machine is taken"):
        run_node(read_node_site(federation / "node-0"), {}, taken)
