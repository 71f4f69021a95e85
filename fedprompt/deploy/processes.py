"""Processes that are started together and ended together, each by its own id.

Every process of a group, and whatever it starts, has an environment variable that no other process
has. Flower's commands start others, some in sessions of their own; with that mark none is missed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedprompt.errors import UserError
from fedprompt.runtime import DEFAULTS

MARK = "FEDPROMPT_GROUP"
GRACE_S = 5.0
TAIL = 15
"""Lines of a log that are shown when its process has failed."""


class Processes:
    """A group of named processes with a log file each; leaving the context ends all of them.

    Args:
        logs: folder for the log files.
        environment: settings beyond this process's own.
    """

    def __init__(self, logs: Path, environment: Mapping[str, str] | None = None) -> None:
        self.logs = logs
        self.mark = uuid.uuid4().hex
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, tuple[list[str], dict[str, str]]] = {}
        self._ended: dict[str, float] = {}
        self.environment = {
            **DEFAULTS,
            **os.environ,
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            **(environment or {}),
            MARK: self.mark,
        }
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command; what it prints is added to `<logs>/<name>.log`."""
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self.environment, **(environment or {})},
                start_new_session=True,
            )
        self.running[name] = process
        self._commands[name] = (list(command), dict(environment or {}))
        return process

    def log(self, name: str) -> Path:
        """The log file of a process."""
        return self.logs / f"{name}.log"

    def check(self, names: Sequence[str] | None = None) -> None:
        """Refuse to go on without these processes (None: all).

        Raises:
            UserError: one has ended; with the end of its log.
        """
        for name, process in self.running.items():
            if (names is None or name in names) and process.poll() is not None:
                raise UserError(
                    f"{name} has ended with status {process.returncode}; see {self.log(name)}: "
                    f"{tail(self.log(name))}"
                )

    def wait_until(self, ready: Callable[[], bool], what: str, timeout: float) -> None:
        """Wait until `ready` while all processes live.

        Raises:
            UserError: it took too long, or a process has ended.
        """
        deadline = time.monotonic() + timeout
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise UserError(f"{what} took more than {timeout:g} s; see {self.logs}.")
            time.sleep(0.1)

    def revive(self, pause: float, ended: Callable[[str, int], None]) -> None:
        """Start again what has ended by itself, `pause` seconds after `ended` was told.

        `ended` takes the process's name and status.
        """
        now = time.monotonic()
        for name, process in list(self.running.items()):
            if process.poll() is None:
                continue
            if name not in self._ended:
                self._ended[name] = now
                ended(name, process.returncode)
            elif now - self._ended[name] > pause:
                del self._ended[name]
                self.start(name, *self._commands[name])

    def last_words(self, name: str, status: int) -> str:
        """One line on a process that has ended."""
        return f"{name} has ended with status {status}: {tail(self.log(name), 3)}"

    def kill(self, name: str) -> None:
        """End one process at once, with all that it has started (its session)."""
        process = self.running.pop(name)
        for child in descendants(process.pid):
            end(child, signal.SIGKILL)
        end(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        """End all processes of the group: politely, then at once."""
        for process in self.running.values():
            end(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while self.alive() and time.monotonic() < deadline:
            for process in self.running.values():
                process.poll()
            time.sleep(0.1)
        while left := self.alive():
            for process_id in left:
                end(process_id, signal.SIGKILL)
            for process in self.running.values():
                process.poll()
            time.sleep(0.05)
        for process in self.running.values():
            process.wait()
        self.running.clear()

    def alive(self) -> list[int]:
        """Ids of all processes of the group, those that they started included."""
        return processes_with(f"{MARK}={self.mark}")


def processes_with(setting: str) -> list[int]:
    """Other processes that have exactly this environment variable; needs /proc."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            with contextlib.suppress(OSError):
                if setting.encode() in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
    return found


def descendants(process_id: int) -> list[int]:
    """All processes that a process has started, and those that they have; needs /proc."""
    parent_of: dict[int, int] = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                rest = (process / "stat").read_text().rpartition(")")[2].split()
                parent_of[int(process.name)] = int(rest[1])
    found = [process_id]
    for known in found:
        found += [child for child, parent in parent_of.items() if parent == known]
    return found[1:]


def end(process_id: int, how: signal.Signals) -> None:
    """Signal one process, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process_id, how)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int, host: str = "127.0.0.1") -> bool:
    """Whether somebody accepts connections there."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


def tail(path: Path, lines: int = TAIL) -> str:
    """The end of a log file."""
    with contextlib.suppress(OSError):
        return " | ".join(path.read_text(errors="replace").splitlines()[-lines:])
    return ""
