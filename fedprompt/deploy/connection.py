"""How a node gets on with its server, read from what Flower's SuperNode writes.

The SuperNode tries again by itself while the server is out of reach. It ends where a connection
breaks off in the TLS handshake, and where the server does not let it in; then it is started again.
Whoever watches the node reads one line each time that something changes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedprompt.deploy.processes import listens

JOINED, AGAIN, FAILED = "SuperNode ID:", "Connection successful", "Connection attempt failed"
"""Words of Flower's lines. The SuperExec, which calls its SuperNode only, has the last two too."""
NOT_ACTIVATED = "[code: 2004]"
"""Flower's answer to a key that it does not know, or whose last connection it still holds."""
BROKEN_OFF = ("_ssl.c", "handshake", "ssl:")


class Connection:
    """What is known of one SuperNode's connection.

    Args:
        log: the SuperNode's log file; what stands in it already is of an earlier start.
        server: the server's address, `host:port`.
        say: takes a line.
        answers: whether the server takes connections.
    """

    def __init__(
        self,
        log: Path,
        server: str,
        say: Callable[[str], None],
        answers: Callable[[], bool] | None = None,
    ) -> None:
        self.log, self.server, self.say = log, server, say
        host, _, port = server.rpartition(":")
        self.answers = answers or (lambda: listens(int(port), host.strip("[]")))
        self._read = log.stat().st_size if log.is_file() else 0
        self._exit: list[str] | None = None
        self._joined = False
        self._said = ""

    def look(self) -> None:
        """Read on, and say what has changed."""
        for line in self._new_lines():
            if JOINED in line or (AGAIN in line and self._joined):
                self._joined = True
                self._say(f"connected to the server {self.server}")
            elif FAILED in line and self._said != self._away and not self.answers():
                self._say(self._away)
            if "Exit Code:" in line:
                self._exit = []
            elif self._exit is not None and not self._exit_is_whole:
                self._exit.append(line.strip())

    def ended(self, name: str, status: int) -> None:
        """Say why the SuperNode has ended, unless that is known already."""
        self.look()
        lines = self._exit or []
        why = " ".join(" ".join(lines[:-1] if self._exit_is_whole else lines).split())
        self._exit, self._joined = None, False
        if "CERTIFICATE_VERIFY_FAILED" in why:
            self._say(
                f"{self.server} is not this federation's server: its certificate is not of our "
                "authority (ca.crt), or not for this address, or a clock is wrong; trying again"
            )
        elif NOT_ACTIVATED in why:
            self._say(
                f"the server {self.server} does not let this node in: it does not know its key, or "
                "still holds its last connection, for a minute at most; trying again"
            )
        elif any(words in why.lower() for words in BROKEN_OFF) or not self.answers():
            self._say(self._away)
        else:
            self._say(f"{name} has ended with status {status}: {why or f'see {self.log}'}")

    @property
    def _away(self) -> str:
        return f"the server {self.server} is out of reach; trying until it answers"

    @property
    def _exit_is_whole(self) -> bool:
        return self._exit is not None and "more information, visit" in "".join(self._exit[-1:])

    def _say(self, line: str) -> None:
        if line != self._said:
            self._said = line
            self.say(line)

    def _new_lines(self) -> list[str]:
        """Whole lines since the last time."""
        if not self.log.is_file():
            return []
        with self.log.open("rb") as stream:
            stream.seek(self._read)
            whole, end, _ = stream.read().rpartition(b"\n")
        self._read += len(whole) + len(end)
        return whole.decode(errors="replace").split("\n") if end else []
