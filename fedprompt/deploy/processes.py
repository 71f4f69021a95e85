"""A group of child processes that are started and ended together, each by its process id.

Every process of a group, and every process that it starts, has an environment variable with a value
that no other process has. Flower's commands start further processes, some of them in sessions of
their own; the variable identifies all of them. A guard (guard.py) ends the group if this process
is killed.

Runs on the server and on nodes: in `deploy server`, `deploy node` and `deploy local`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedprompt.deploy import guard
from fedprompt.deploy.guard import PROC, kill_group, members, send_signal
from fedprompt.deploy.ownership import Ownership
from fedprompt.errors import UserError
from fedprompt.runtime import DEFAULTS
from fedprompt.runtime.peer_text import sanitised

GRACE_S = 5.0
"""Time between SIGTERM and SIGKILL."""
AT_ONCE_S, MAX_AT_ONCE = 60.0, 5
"""A process that exits so often within so many seconds of its start is not started again."""
TAIL_LINES = 15
"""Lines of a log that are quoted when its process has failed."""


class Processes:
    """A group of named processes, each with a log file; leaving the context ends all of them.

    Args:
        folder: the group's folder, which is created if it does not exist. Logs are in `logs/`.
        environment: variables of all processes, beyond this process's own.

    Raises:
        UserError: another process runs a group in this folder.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.ownership = Ownership(folder)
        self.environment = {**flower_environment(), **(environment or {})}
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, tuple[list[str], dict[str, str]]] = {}
        self._exited_at: dict[str, float] = {}
        self._started_at: dict[str, float] = {}
        self._at_once: dict[str, int] = {}
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command; its output is appended to `<logs>/<name>.log`.

        Args:
            name: the process's name in this group.
            command: the program and its arguments.
            environment: variables of this process, beyond the group's.
        """
        # First of all: from its very start, no process of the group is without a guard.
        if self._guard is None:
            self._guard = self._start_guard()
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self.environment, **(environment or {}), **self.ownership.environment},
                # Ctrl-C in a terminal must reach this process only; `stop` then ends the children.
                start_new_session=True,
            )
        # A guard that was killed cannot be told; the group then goes on without it.
        with contextlib.suppress(OSError):
            assert self._guard.stdin is not None
            self._guard.stdin.write(b"%d\n" % process.pid)
        self.running[name] = process
        self._started_at[name] = time.monotonic()
        self._commands[name] = (list(command), dict(environment or {}))
        return process

    def log(self, name: str) -> Path:
        """The log file of a process."""
        return self.logs / f"{name}.log"

    def check(self, names: Sequence[str] | None = None) -> None:
        """Raise if one of these processes (None: any process of the group) has exited.

        Raises:
            UserError: with the end of that process's log.
        """
        for name, process in self.running.items():
            if (names is None or name in names) and process.poll() is not None:
                raise UserError(
                    f"{name} exited with status {process.returncode}; see {self.log(name)}: "
                    f"{tail(self.log(name))}"
                )

    def wait_until(self, ready: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Wait for a condition while all processes of the group run.

        Args:
            ready: returns whether the condition holds.
            what: names what is waited for, at the start of the error message.
            timeout_s: seconds to wait.

        Raises:
            UserError: the condition does not hold in time, or a process has exited.
        """
        deadline = time.monotonic() + timeout_s
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise UserError(f"{what} took more than {timeout_s:g} s; see {self.logs}.")
            time.sleep(0.1)

    def restart_exited(self, pause_s: float, report: Callable[[str, int], bool | None]) -> None:
        """Restart processes that have exited by themselves; to be called in a loop.

        Args:
            pause_s: seconds between the report and the new start.
            report: is called with the name and the exit status of every process that has exited.
                It returns True if waiting may help, for example for the server.

        Raises:
            UserError: a process has exited at once again and again, so that another start would
                not help.
        """
        now = time.monotonic()
        for name, process in list(self.running.items()):
            if process.poll() is None:
                continue
            if name not in self._exited_at:
                self._exited_at[name] = now
                waits = report(name, process.returncode)
                at_once = now - self._started_at[name] < AT_ONCE_S and not waits
                self._at_once[name] = self._at_once.get(name, 0) + 1 if at_once else 0
                if self._at_once[name] == MAX_AT_ONCE:
                    raise UserError(
                        f"{name} has exited {MAX_AT_ONCE} times in a row within {AT_ONCE_S:g} s of "
                        f"its start, with status {process.returncode}: {tail(self.log(name), 1)}"
                    )
            elif now - self._exited_at[name] > pause_s:
                del self._exited_at[name]
                self.start(name, *self._commands[name])

    def exit_line(self, name: str, status: int) -> str:
        """One line about a process that has exited, with the end of its log."""
        return f"{name} exited with status {status}: {tail(self.log(name), 3)}"

    def kill(self, name: str) -> None:
        """Kill one process and all processes that it has started."""
        process = self.running.pop(name)
        # The children come first: after their parent has ended, nothing links them to it.
        for child in descendants(process.pid):
            send_signal(child, signal.SIGKILL)
        send_signal(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        """End all processes of the group: by SIGTERM, and those that remain by SIGKILL."""
        sessions = self._sessions()
        for process_id in self.alive():
            send_signal(process_id, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while self.alive() and time.monotonic() < deadline:
            for process in self.running.values():
                process.poll()
            time.sleep(0.1)
        kill_group(self.ownership.setting, self._sessions)
        if not guard.PROC.is_dir():
            # Members of a session are not seen any more once the process that began it has ended.
            for session in sessions:
                guard.signal_session(session, signal.SIGKILL)
        for process in self.running.values():
            process.wait()
        self.running.clear()
        if self._guard is not None:
            # It has nothing left to do. SIGKILL, because it ignores the other signals.
            self._guard.kill()
            self._guard.communicate()
            self._guard = None
        self.ownership.release()

    def alive(self) -> list[int]:
        """Ids of all processes of the group, including those that its members have started."""
        return members(self.ownership.setting, self._sessions)

    def _sessions(self) -> list[int]:
        """The sessions of the processes that have not been waited for."""
        return [process.pid for process in self.running.values() if process.poll() is None]

    def _start_guard(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            # By its path and isolated: it starts at once and depends on nothing.
            [sys.executable, "-I", "-S", guard.__file__, self.ownership.setting],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            start_new_session=True,
        )


def flower_environment() -> dict[str, str]:
    """Environment variables for Flower's commands: this process's own and those they need."""
    return {
        **DEFAULTS,
        **os.environ,
        # Flower would run `uv sync` for every run, which fails on a machine without internet
        # access.
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        # Flower's commands belong to this Python installation, which need not be on PATH.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def descendants(process_id: int) -> list[int]:
    """Ids of all processes that a process has started, directly or indirectly."""
    parent_of: dict[int, int] = {}
    for process in PROC.iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                # The command's name stands in parentheses and may itself contain any character.
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                parent_of[int(process.name)] = int(fields[1])
    family = [process_id]
    for member in family:
        family += [child for child, parent in parent_of.items() if parent == member]
    return family[1:]


def free_port() -> int:
    """A port of the loopback interface on which no process listens now."""
    with socket.socket() as probe:
        # Port 0 lets the system choose.
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a TCP connection to this address is accepted within a second."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log file, joined to one line; empty if it cannot be read."""
    with contextlib.suppress(OSError):
        last = path.read_text(errors="replace").splitlines()[-lines:]
        # Flower's logs quote its peers as they are.
        return " | ".join(sanitised(line) for line in last)
    return ""
