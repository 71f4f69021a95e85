"""Ends a group of processes when the process that has started them is gone, however it ended.

`Processes` (processes.py) starts this module as a process of its own and holds one end of a pipe.
The operating system closes that end when the owner ends, even if it was killed by SIGKILL, and
this process then kills the whole group. There is no race with a start: a child that is just being
started holds the pipe as well, until it has become a member of the group.

It must neither fail nor need much memory, so it imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

Sessions = Callable[[], Iterable[int]]
PROC = Path("/proc")
QUIET_S = 0.5
"""Seconds for which no member must be seen: a process has no environment while it is loaded."""
PAUSE_S = 0.05


def main() -> None:
    """Wait until the owner is gone, then kill the group that `sys.argv[1]` names."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        # A signal to all processes of a terminal or a service must not end this one first.
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    # The owner writes the session of every process that it starts. The loop ends with the owner.
    sessions = [int(line) for line in sys.stdin.buffer]
    kill_group(sys.argv[1], lambda: sessions, quiet_s=QUIET_S)


def members(setting: str, sessions: Sessions = tuple) -> list[int]:
    """Ids of all processes of a group, including those that its members have started.

    Args:
        setting: `NAME=value`, which all of them have in their environment. It also finds those that
            have left their session, but needs /proc, which only Linux has.
        sessions: returns the ids of the sessions that were started; elsewhere, the members are
            those that still exist.
    """
    if PROC.is_dir():
        return processes_with(setting)
    return [session for session in sessions() if signal_session(session, 0)]


def kill_group(setting: str, sessions: Sessions = tuple, *, quiet_s: float = 0.0) -> int:
    """Kill all processes of a group until none is left.

    Args:
        setting: as for `members`.
        sessions: as for `members`.
        quiet_s: seconds for which no member must be seen.

    Returns:
        The number of processes that were killed.
    """
    killed: set[int] = set()
    seen = time.monotonic()
    # A process may start another one just before it is killed, so this is repeated.
    while (found := members(setting, sessions)) or time.monotonic() - seen < quiet_s:
        for process_id in found:
            seen = time.monotonic()
            send_signal(process_id, signal.SIGKILL)
            if not PROC.is_dir():
                signal_session(process_id, signal.SIGKILL)
        killed |= set(found)
        time.sleep(PAUSE_S)
    return len(killed)


def processes_with(setting: str) -> list[int]:
    """Ids of the other processes whose environment contains exactly `NAME=value`."""
    process_ids = []
    for process in PROC.iterdir():
        # Other users' processes cannot be read, and any process may end meanwhile, hence
        # `suppress`.
        if process.name.isdigit() and int(process.name) != os.getpid():
            with contextlib.suppress(OSError):
                if setting.encode() in (process / "environ").read_bytes().split(b"\0"):
                    process_ids.append(int(process.name))
    return process_ids


def send_signal(process_id: int, number: signal.Signals) -> None:
    """Send a signal to one process; does nothing if it no longer exists."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process_id, number)


def signal_session(session: int, number: int) -> bool:
    """Send a signal to the processes of a session; returns whether there are any."""
    try:
        os.killpg(session, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


if __name__ == "__main__":
    main()
