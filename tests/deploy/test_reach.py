"""A proxy of the environment is named if it lies in the way, and never lies on the loopback."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from fedprompt.deploy.connection import Connection
from fedprompt.deploy.credentials import CA_CERTIFICATE
from fedprompt.deploy.fleet_proxy import FleetProxy
from fedprompt.deploy.new_federation import create_federation
from fedprompt.deploy.processes import free_port
from fedprompt.deploy.reach import VARIABLES, call, proxy_variable
from fedprompt.runtime import set_defaults


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")  # set, so that it is restored afterwards
        monkeypatch.delenv(name)


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    create_federation(tmp_path / "f", ["fed.example"], 1, 9092, 30)
    return tmp_path / "f" / "node-0" / CA_CERTIFICATE


@pytest.mark.parametrize("name", VARIABLES)
def test_the_probe_goes_through_the_proxy_that_is_named(
    name: str, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(10)
        monkeypatch.setenv(name, f"http://user:secret@127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.setattr("fedprompt.deploy.reach.TIMEOUT_S", 0.2)
        assert call("fed.example:9092", authority) is None
        connection, _ = proxy.accept()
        with connection:
            assert connection.recv(100).startswith(b"CONNECT fed.example:9092 ")
    assert proxy_variable("fed.example:9092") == name
    monkeypatch.setenv("no_proxy", "fed.example")
    assert proxy_variable("fed.example:9092") == ""


def test_an_unreachable_server_is_reported_with_the_variable(tmp_path: Path) -> None:
    lines: list[str] = []
    log = tmp_path / "log"
    connection = Connection(log, "fed:9092", lines.append, lambda: False, proxy="HTTPS_PROXY")
    log.write_text("WARNING :   Connection attempt failed, retrying in 0.8 seconds\n")
    connection.update()
    (line,) = lines
    assert "fed:9092 cannot be reached" in line
    assert "HTTPS_PROXY" in line
    assert "NO_PROXY=fed " in line


def test_nobody_answers_on_a_free_port(authority: Path) -> None:
    assert call(f"127.0.0.1:{free_port()}", authority) is None


def test_the_loopback_interface_is_never_behind_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    set_defaults()
    assert "no_proxy" not in os.environ, "nothing is set without a proxy"
    monkeypatch.setenv("ALL_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "intern.example")
    set_defaults()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"]
    assert os.environ["NO_PROXY"].startswith("intern.example,")
    for host in ("127.0.0.1", "localhost", "[::1]", "intern.example"):
        assert proxy_variable(f"{host}:9092") == ""
    assert proxy_variable("fed.example:9092") == "ALL_PROXY"


def test_the_gate_calls_the_superlink_directly(
    authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://proxy.example:3128")
    nobody: Any = None
    assert not FleetProxy("https://127.0.0.1:8000", authority, nobody).client.trust_env
