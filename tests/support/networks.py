"""Machines for tests: network namespaces, each with an address, that a bridge connects.

Each machine has its own network stack: interfaces, loopback, ports, routes. The bridge is in a
namespace too, so the network of the machine that runs the tests is neither changed nor reachable.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedprompt.deploy.guard import send_signal

LINE = "eth0"
"""A machine's own interface."""


class Network:
    """Machines by name; leaving the context ends the processes in them and removes them."""

    def __init__(self, machines: Sequence[str]) -> None:
        self.machines = tuple(machines)
        self.prefix = f"fp{os.getpid():x}"
        self._namespaces: list[str] = []

    def __enter__(self) -> Network:
        try:
            switch = self._add("switch")
            _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", switch, "link", "set", "bridge", "up")
            for machine in self.machines:
                self._join(machine, switch)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes and remove all namespaces."""
        for name in self._namespaces:
            for process_id in _ip("netns", "pids", name).split():
                send_signal(int(process_id), signal.SIGKILL)
            _ip("netns", "del", name)
        self._namespaces.clear()

    def address(self, machine: str) -> str:
        """A machine's IP address."""
        return f"10.77.0.{self.machines.index(machine) + 1}"

    def inside(self, machine: str) -> list[str]:
        """The words before a command that make it run on a machine."""
        return ["ip", "netns", "exec", self._name(machine)]

    def run(self, machine: str, *command: str) -> str:
        """What a command prints on a machine."""
        return _run(*self.inside(machine), *command)

    def unplug(self, machine: str) -> None:
        """Disconnect a machine, at the bridge's end of its line."""
        _ip("-n", self._name("switch"), "link", "set", machine, "down")

    def plug(self, machine: str) -> None:
        """Connect the machine again."""
        _ip("-n", self._name("switch"), "link", "set", machine, "up")

    @contextmanager
    def poor_line(self, machine: str) -> Iterator[None]:
        """Delay and lose packets in both directions.

        By netem; if the kernel lacks it, by a slow line with a short queue.
        """
        ends = ((self._name(machine), LINE), (self._name("switch"), machine))
        netem = ("netem", "delay", "150ms", "50ms", "loss", "5%")
        slow = ("tbf", "rate", "128kbit", "burst", "1600", "limit", "3200")
        shaped = []
        try:
            for name, line in ends:
                for shaping in (netem, slow):
                    with contextlib.suppress(subprocess.CalledProcessError):
                        _run("tc", "-n", name, "qdisc", "add", "dev", line, "root", *shaping)
                        shaped.append((name, line))
                        break
                else:
                    pytest.skip("tc has neither netem nor tbf here")
            yield
            dropped = [_run("tc", "-n", n, "-s", "qdisc", "show", "dev", d) for n, d in shaped]
            assert any("(dropped 0," not in text for text in dropped), dropped
        finally:
            for name, line in shaped:
                _run("tc", "-n", name, "qdisc", "del", "dev", line, "root")

    def listeners(self, machine: str) -> list[tuple[str, int]]:
        """Address (as hexadecimal digits) and port of every TCP socket that listens there."""
        sockets = []
        for table in ("tcp", "tcp6"):
            for row in self.run(machine, "cat", f"/proc/net/{table}").splitlines()[1:]:
                fields = row.split()
                if fields[3] == "0A":
                    address, _, port = fields[1].partition(":")
                    sockets.append((address, int(port, 16)))
        return sorted(sockets)

    def connections(self, machine: str, port: int) -> int:
        """How many established connections a machine has to a port of other machines."""
        rows = self.run(machine, "cat", "/proc/net/tcp").splitlines()[1:]
        return sum(
            row.split()[3] == "01" and row.split()[2].endswith(f":{port:04X}") for row in rows
        )

    def _join(self, machine: str, switch: str) -> None:
        name = self._add(machine)
        _ip("link", "add", LINE, "netns", name, "type", "veth", "peer", machine, "netns", switch)
        _ip("-n", switch, "link", "set", machine, "master", "bridge", "up")
        _ip("-n", name, "addr", "add", f"{self.address(machine)}/24", "dev", LINE)
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "link", "set", LINE, "up")

    def _add(self, name: str) -> str:
        _ip("netns", "add", self._name(name))
        self._namespaces.append(self._name(name))
        return self._name(name)

    def _name(self, name: str) -> str:
        return f"{self.prefix}-{name}"


def why_not() -> str | None:
    """Why such a network cannot be created here; None if it can."""
    if not Path("/proc/self/ns/net").exists():
        return "no network namespaces here"
    try:
        with Network(["one"]):
            return None
    except OSError as error:
        return f"no 'ip' command: {error}"
    except subprocess.CalledProcessError as error:
        return f"no permission to create network namespaces: {error.stderr.strip()}"


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
