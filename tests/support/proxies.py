"""A line between a node and the server that can be cut."""

from __future__ import annotations

import contextlib
import socket
import threading


class Proxy:
    """Passes bytes between its own port and another one of the loopback interface."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.cuts = 0
        self.port = 0
        self._listener = socket.socket()
        self._lines: list[socket.socket] = []

    def __enter__(self) -> Proxy:
        self.mend()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()

    def cut(self) -> None:
        """Break all connections; new ones are refused."""
        _close(self._listener)
        for line in self._lines:
            self.cuts += 1
            _close(line)
        self._lines.clear()

    def mend(self) -> None:
        """Take connections, on the same port as before."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                self._lines += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _close(line: socket.socket) -> None:
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
    line.close()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for line in (source, sink):
        with contextlib.suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)
