"""Ports that cannot be used are reported first; a process that never stays up ends the command."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedprompt.deploy import processes as processes_module
from fedprompt.deploy.folders import SETTINGS, read_node_folder, read_server_folder
from fedprompt.deploy.new_federation import create_federation
from fedprompt.deploy.processes import MAX_AT_ONCE, Processes, free_port
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


def test_the_two_ports_of_a_server_differ(federation: Path) -> None:
    server = read_server_folder(federation / "server")
    with pytest.raises(UserError, match="superlink_port"):
        serve(replace(server, port=server.superlink_port), "127.0.0.1")


def test_a_host_to_listen_on_has_no_port(federation: Path) -> None:
    with pytest.raises(UserError, match="--host"):
        serve(read_server_folder(federation / "server"), "0.0.0.0:9092")


def restarts(processes: Processes, *, waits: bool, times: int) -> list[int]:
    """Exit statuses of a process that exits at once, for at most so many starts."""
    statuses: list[int] = []

    def report(name: str, status: int) -> bool:
        statuses.append(status)
        return waits

    processes.start("worker", ["/bin/sh", "-c", "echo no such library; exit 3"])
    while len(statuses) < times:
        processes.running["worker"].wait()
        processes.restart_exited(-1.0, report)
    return statuses


def test_a_process_that_always_exits_at_once_is_given_up(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes, pytest.raises(UserError) as caught:
        restarts(processes, waits=False, times=MAX_AT_ONCE + 1)
    for words in ("worker", "status 3", "no such library"):
        assert words in str(caught.value)


def test_a_process_that_waits_for_the_server_is_not(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        assert restarts(processes, waits=True, times=MAX_AT_ONCE + 2) == [3] * (MAX_AT_ONCE + 2)


def test_a_process_that_has_run_for_a_while_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes_module, "AT_ONCE_S", 0.0)
    with Processes(tmp_path) as processes:
        assert len(restarts(processes, waits=False, times=MAX_AT_ONCE + 2)) == MAX_AT_ONCE + 2
