"""A federation of four machines, set up by the commands of docs/deployment.md, and network faults.

The machines are network namespaces. Each has its own address, ports, loopback interface and
folders; they share a kernel, a clock and the installed program. The folders with the keys are moved
from where they were created, so no machine has another machine's keys.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from fedprompt.config.schema import Config, to_yaml
from fedprompt.deploy.credentials import write_node_key
from fedprompt.deploy.guard import send_signal
from fedprompt.deploy.processes import descendants
from tests.support.doc_pages import DOCS, commands
from tests.support.federations import (
    Watched,
    config_for,
    last_words,
    needs_processes,
    write_clients,
)
from tests.support.networks import Network, why_not
from tests.support.shells import Shell

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), needs_processes]

NODES = 3
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}
"""127.0.0.1 and ::1, as /proc/net/tcp writes them."""
CONNECT = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5) as line:
        line.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
        print("answered", line.recv(100))
except OSError as error:
    print(type(error).__name__)
"""


def documented(command: str, changes: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """The words after `fedprompt deploy` in the documentation's first command of this name.

    Args:
        command: for example `init`.
        changes: words of the documentation, and what the test uses instead.
    """
    lines = (shlex.split(line, comments=True) for line in commands(DOCS / "deployment.md"))
    words = next(w[2:] for w in lines if w[1:3] == ["deploy", command])
    assert set(changes) <= set(words), "the test changes what the documentation says"
    return [changes.get(word, word) for word in words]


class Machines:
    """One running server and three running nodes, each on its own machine."""

    def __init__(self, folder: Path, network: Network, shell: Shell) -> None:
        self.folder, self.network, self.shell = folder, network, shell
        self.nodes = [f"node-{k}" for k in range(NODES)]
        self.started: dict[int, subprocess.Popen[bytes]] = {}
        self.runs = 0
        self.server = self._init()
        for node in self.nodes:
            self.start_node(node)
        for k, process in self.started.items():
            shell.wait_for(self.nodes[k], "connected to the server", process)

    def home(self, machine: str) -> Path:
        return self.folder / machine

    def deploy(self, machine: str, output: str, *arguments: str) -> subprocess.Popen[bytes]:
        """`fedprompt deploy <arguments>` on a machine, in its own folder."""
        home = self.home(machine)
        return self.shell.start(
            output, *arguments, before=self.network.inside(machine), cwd=home,
            environment={"HOME": str(home), "FEDPROMPT_CACHE": str(home / "cache")},
        )  # fmt: skip

    def start_node(self, node: str) -> None:
        changes = {"federation/node-0": f"federation/{node}", "/srv/images": "images"}
        self.started[self.nodes.index(node)] = self.deploy(
            node, node, *documented("node", changes), "--device", "cpu"
        )

    def run(self, rounds: int, **federation: Any) -> Run:
        """Run an experiment with `deploy run` on the server's machine."""
        self.runs += 1
        home = self.home("server")
        config = config_for(
            self.folder / "images", home / f"run-{self.runs}", NODES, rounds,
            federation={"timeout_s": 240, **federation},
        )  # fmt: skip
        there = replace(config, data=replace(config.data, folders=[]))
        (home / "experiment.yaml").write_text(to_yaml(there), encoding="utf-8")
        logs = [self.supernode(k) for k in range(NODES)]
        starts = [len(log.read_text()) if log.is_file() else 0 for log in logs]
        output = f"run-{self.runs}"
        started = self.deploy("server", output, *documented("run"))
        return Run(self, config, output, started, starts)

    def supernode(self, client: int) -> Path:
        node = self.nodes[client]
        return self.home(node) / "federation" / node / "logs" / "supernode.log"

    def _init(self) -> subprocess.Popen[bytes]:
        """Put keys and images where they belong, and start the server; returns its process."""
        address, names = self.network.address("server"), ["server", *self.nodes]
        write_clients(self.folder / "images", NODES)
        words = documented("init", {"fed.example.org": address})
        init = self.shell.start("init", *words, cwd=self.folder)
        assert init.wait() == 0, self.shell.output("init")
        created = self.folder / "federation"
        for name in names:
            (self.home(name) / "federation").mkdir(parents=True)
            shutil.move(created / name, self.home(name) / "federation" / name)
        shutil.rmtree(created)
        for k, node in enumerate(self.nodes):
            shutil.copytree(self.folder / "images" / f"client-{k}", self.home(node) / "images")
        server = self.deploy("server", "server", *documented("server"))
        self.shell.wait_for("server", f"ready for {NODES} nodes on 0.0.0.0:9092", server)
        return server

    def connect(self, machine: str, address: str, port: int) -> str:
        """What happens to a connection without TLS."""
        return self.network.run(machine, sys.executable, "-c", CONNECT, address, str(port)).strip()


class Run(Watched):
    """A run that `fedprompt deploy run` follows."""

    def __init__(
        self,
        machines: Machines,
        config: Config,
        output: str,
        process: subprocess.Popen[bytes],
        starts: list[int],
    ) -> None:
        super().__init__(config)
        self.machines, self.output, self.process, self.starts = machines, output, process, starts

    def node_log(self, client: int) -> str:
        log = self.machines.supernode(client)
        return log.read_text()[self.starts[client] :] if log.is_file() else ""

    def state_folder(self, client: int) -> Path:
        node = self.machines.nodes[client]
        return self.machines.home(node) / "federation" / node / "state"

    def diagnosis(self) -> str:
        names = [self.output, "server", *self.machines.nodes]
        texts = [f"== {name}\n{self.machines.shell.output(name)[-1500:]}" for name in names]
        logs = [last_words(self.machines.supernode(k).parent) for k in range(NODES)]
        return "\n".join([*texts, *logs])

    def wait_for_end(self) -> None:
        """Wait until the command has printed the result and ended with status 0."""
        self.wait_for(lambda: self.process.poll() is not None, "the end of the run")
        assert self.process.returncode == 0, self.diagnosis()


def wait_until(reached: Callable[[], object], what: str, wait: float = 120.0) -> None:
    deadline = time.monotonic() + wait
    while not reached():
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("m")
    names = ["server", *(f"node-{k}" for k in range(NODES))]
    with Network(names) as network, Shell(folder) as shell:
        yield Machines(folder, network, shell)


@pytest.fixture(autouse=True)
def plugged_in(machines: Machines) -> Iterator[None]:
    yield
    for node in machines.nodes:
        machines.network.plug(node)


def test_three_nodes_on_other_machines_equal_the_simulation(
    machines: Machines, tmp_path: Path
) -> None:
    run = machines.run(rounds=2)
    run.wait_for_end()
    assert run.lost_and_nothing_else(tmp_path / "twin") == set()
    for node in machines.nodes:
        assert "connected to the server 10.77.0.1:9092" in machines.shell.output(node)


def test_the_server_has_one_open_port_and_a_node_has_none(machines: Machines) -> None:
    network = machines.network
    ports = {port: address in LOOPBACK for address, port in network.listeners("server")}
    assert {port for port, private in ports.items() if not private} == {9092}
    assert 8000 in ports, "the SuperLink listens"
    for port in ports:
        if port != 9092:
            outcome = machines.connect("node-0", network.address("server"), port)
            assert outcome == "ConnectionRefusedError", port
    assert machines.connect("server", "127.0.0.1", 8000) != "ConnectionRefusedError"
    assert "200" not in machines.connect("node-0", network.address("server"), 9092)
    for node in machines.nodes:
        listening = network.listeners(node)
        assert listening, "the SuperNode's own children connect to it"
        assert {address for address, _ in listening} <= LOOPBACK


def test_a_key_that_is_not_registered_is_rejected(machines: Machines) -> None:
    home = machines.home("node-2") / "federation"
    shutil.copytree(home / "node-2", home / "stranger", ignore=shutil.ignore_patterns("*.sock"))
    write_node_key(home / "stranger")
    stranger = machines.deploy(
        "node-2", "stranger", "node", "federation/stranger", "--data", "images", "--port", "9194"
    )
    machines.shell.wait_for("stranger", "rejected this node", stranger)
    assert "connected" not in machines.shell.output("stranger")
    machines.shell.stop(stranger)


def test_an_interruption_of_20_seconds_delays_and_lost_packets_lose_nothing(
    machines: Machines, tmp_path: Path
) -> None:
    with machines.network.poor_line("node-1"):
        run = machines.run(rounds=3)
        run.wait_until_training(2, 2)
        machines.network.unplug("node-2")
        run.pause(20)
        machines.network.plug("node-2")
        run.wait_for_end()
    assert run.lost_and_nothing_else(tmp_path / "twin") == set()


def test_a_permanent_interruption(machines: Machines, tmp_path: Path) -> None:
    run = machines.run(rounds=3, min_replies=2)
    run.wait_until_training(2, 2)
    machines.network.unplug("node-2")
    run.wait_for_end()
    assert "client 2: reply dropped" in run.log()
    assert run.lost_and_nothing_else(tmp_path / "twin") == {(2, 2), (2, 3)}
    assert run.lines()[2]["clients"] == {"sampled": 3, "accepted": 2, "rejected": 1}


def test_a_node_that_starts_offline_and_loses_the_network_in_a_handshake(
    machines: Machines, tmp_path: Path
) -> None:
    """It joins when the network is back, and reports once that it waits for the server."""
    network, shell = machines.network, machines.shell
    shell.stop(machines.started[2])
    network.unplug("node-2")
    machines.start_node("node-2")
    node = machines.started[2]
    shell.wait_for("node-2", "cannot be reached", node)

    # While the fleet proxy is stopped, a new connection stays in its TLS handshake.
    (proxy,) = (
        child for child in descendants(machines.server.pid)
        if b"deploy\0fleet-proxy\0" in Path(f"/proc/{child}/cmdline").read_bytes()
    )  # fmt: skip
    send_signal(proxy, signal.SIGSTOP)
    try:
        network.plug("node-2")
        wait_until(lambda: network.connections("node-2", 9092), "a connection")
        network.unplug("node-2")
    finally:
        send_signal(proxy, signal.SIGCONT)
    log = machines.supernode(2)
    started = log.stat().st_size
    wait_until(lambda: b"Exit Code: 305" in log.read_bytes()[started:], "the SuperNode's end")
    network.plug("node-2")
    shell.wait_for("node-2", "connected to the server", node)
    lines = shell.output("node-2").splitlines()
    states = ["client 2", "cannot be reached", "connected to the server"]
    assert len(lines) == len(states), lines
    assert all(state in line for state, line in zip(states, lines, strict=True)), lines
    assert all("10.77.0.1:9092" in line for line in lines)
    run = machines.run(rounds=1)
    run.wait_for_end()
    assert run.lost_and_nothing_else(tmp_path / "twin") == set()
