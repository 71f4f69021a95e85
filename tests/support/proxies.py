"""A connection between a node and the server that can be interrupted."""

from __future__ import annotations

import contextlib
import socket
import threading


class Proxy:
    """Forwards bytes between its own port and another port of the loopback interface.

    Args:
        target: the port to which connections are forwarded.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.cuts = 0
        self.port = 0
        self._listener = socket.socket()
        self._lines: list[socket.socket] = []

    def __enter__(self) -> Proxy:
        self.restore()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()

    def cut(self) -> None:
        """Close all connections and refuse new ones."""
        _close(self._listener)
        for line in self._lines:
            self.cuts += 1
            _close(line)
        self._lines.clear()

    def restore(self) -> None:
        """Accept connections, on the same port as before."""
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
