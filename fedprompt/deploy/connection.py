"""Turns the log of Flower's SuperNode into short lines for the node's administrator.

Runs in `fedprompt deploy node`, which supervises the SuperNode. The SuperNode retries by itself
while the server cannot be reached. It exits when a TLS handshake fails and when the server rejects
it; `deploy node` then starts it again. One line is printed whenever the state changes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from fedprompt.deploy.addresses import split_address
from fedprompt.deploy.processes import listens, tail

JOINED, RECONNECTED, FAILED = (
    "SuperNode ID:",
    "Connection successful",
    "Connection attempt failed",
)
"""Parts of Flower's log lines. The SuperExec, which connects to its own SuperNode only, writes the
last two as well, so they count only together with something else that is known."""
NOT_ACTIVATED = "[code: 2004]"
"""Flower's answer to a key that it does not know, or whose previous connection is still open."""
EXIT_LINES = 20
"""How many of its last lines a SuperNode's log holds the reason of its exit in."""
PROBE_S = 30.0
"""Seconds between two probes while the SuperNode retries by itself."""
BROKEN_HANDSHAKE = ("_ssl.c", "handshake", "ssl:")


def was_rejected(log: Path) -> bool:
    """Whether a SuperNode has exited because the SuperLink would not have it yet.

    The SuperLink rejects a key for most of a minute after a process with it was killed, so that
    another start helps.

    Args:
        log: the SuperNode's log file.
    """
    return NOT_ACTIVATED in tail(log, EXIT_LINES)


class Connection:
    """The state of one SuperNode's connection to the server, as far as its log shows it.

    Args:
        log: the SuperNode's log file; lines that it already has belong to an earlier start.
        server: the server's address, `host:port`.
        report: is called with each line for the administrator.
        answers: returns whether the server can be reached; None probes `server` over TCP.
        find_fault: returns why the server and this node refuse each other, or None; see
            diagnosis.py.
        proxy: the environment variable whose proxy lies between; empty for none.
    """

    def __init__(
        self,
        log: Path,
        server: str,
        report: Callable[[str], None],
        answers: Callable[[], bool] | None = None,
        find_fault: Callable[[], str | None] = lambda: None,
        proxy: str = "",
    ) -> None:
        self.proxy = proxy
        self.log, self.server, self.report = log, server, report
        host, port = split_address(server)
        self.answers = answers or (lambda: listens(int(port), host.strip("[]")))
        self.find_fault = find_fault
        self._probed_at = -math.inf
        self._offset = log.stat().st_size if log.is_file() else 0
        self._exit_lines: list[str] | None = None
        self._joined = False
        self._last_report = ""

    def update(self) -> None:
        """Read the log's new lines and report a change of state."""
        for line in self._new_lines():
            if JOINED in line or (RECONNECTED in line and self._joined):
                self._joined = True
                self._report(f"connected to the server {self.server}")
            elif FAILED in line and self._last_report != self._unreachable:
                if not self.answers():
                    self._report(self._unreachable)
                else:
                    self.report_fault()
            # Flower explains an exit in a block between these two lines.
            if "Exit Code:" in line:
                self._exit_lines = []
            elif self._exit_lines is not None and not self._exit_is_complete:
                self._exit_lines.append(line.strip())

    def report_fault(self) -> None:
        """Report why the server and this node refuse each other, if they do."""
        # Flower logs a failed attempt every few seconds, and each probe is a call of the server.
        if time.monotonic() - self._probed_at > PROBE_S:
            self._probed_at = time.monotonic()
            if fault := self.find_fault():
                self._report(f"{fault}; retrying")

    def report_exit(self, name: str, status: int) -> bool:
        """Report why the SuperNode has exited, unless the last report said the same.

        Args:
            name: the process's name, for exits that are not about the connection.
            status: its exit status.

        Returns:
            Whether the connection is the reason, so that a later start may succeed.
        """
        self.update()
        lines = self._exit_lines or []
        reason = " ".join(" ".join(lines[:-1] if self._exit_is_complete else lines).split())
        # The SuperNode is started again, and its next connection must be reported as a new one.
        self._exit_lines, self._joined = None, False
        # The order matters: a rejected certificate is also a broken handshake.
        if NOT_ACTIVATED not in reason and (fault := self.find_fault()):
            self._report(f"{fault}; retrying")
        elif "CERTIFICATE_VERIFY_FAILED" in reason:
            self._report(
                f"the certificate of {self.server} was rejected: it was not issued by this "
                "federation's authority (ca.crt), or not for this address, or one of the two "
                "clocks is wrong; retrying"
            )
        elif NOT_ACTIVATED in reason:
            self._report(
                f"the server {self.server} rejected this node: its key is not registered there, "
                "or its previous connection is still open, which takes a minute at most; retrying"
            )
        elif any(words in reason.lower() for words in BROKEN_HANDSHAKE) or not self.answers():
            self._report(self._unreachable)
        else:
            self._report(f"{name} exited with status {status}: {reason or f'see {self.log}'}")
            return False
        return True

    @property
    def _unreachable(self) -> str:
        host, _ = split_address(self.server)
        way = (
            f" through the proxy that {self.proxy} names (with NO_PROXY={host.strip('[]')} the "
            "node goes around it)"
            if self.proxy
            else ""
        )
        return f"the server {self.server} cannot be reached{way}; retrying until it answers"

    @property
    def _exit_is_complete(self) -> bool:
        lines = self._exit_lines
        return lines is not None and "more information, visit" in "".join(lines[-1:])

    def _report(self, line: str) -> None:
        if line != self._last_report:
            self._last_report = line
            self.report(line)

    def _new_lines(self) -> list[str]:
        """The lines that were completed since the last call; half a line waits for its rest."""
        if not self.log.is_file():
            return []
        # Read as bytes, because the offset counts bytes and the last character may be incomplete.
        with self.log.open("rb") as stream:
            stream.seek(self._offset)
            complete, newline, _ = stream.read().rpartition(b"\n")
        self._offset += len(complete) + len(newline)
        return complete.decode(errors="replace").split("\n") if newline else []
