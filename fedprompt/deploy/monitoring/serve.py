"""Shows the state of a federation on the loopback interface: a page, JSON and Prometheus' metrics.

Only `GET` is answered, so nothing can be changed. Requests must name this machine in their `Host`,
so that no web site can read the page by giving its own name the address of the loopback interface.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

from fedprompt.deploy.folders import ServerFolder
from fedprompt.deploy.monitoring.collect import Status, collect
from fedprompt.deploy.monitoring.views import REFRESH_S, as_metrics, as_page
from fedprompt.errors import UserError

HOSTS = ("127.0.0.1", "localhost", "[::1]")
HEADERS = [
    (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'"),
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
]


class StatusSite:
    """An ASGI application that shows a state.

    Args:
        read: returns the state; it is asked at most every `REFRESH_S` / 2 seconds.
    """

    def __init__(self, read: Callable[[], Status]) -> None:
        self._read = read
        self._status: Status | None = None
        self._read_at = 0.0
        self._lock = asyncio.Lock()

    async def __call__(
        self,
        scope: Any,
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
    ) -> None:
        """Answer one request; the arguments are those of the ASGI protocol."""
        if scope["type"] != "http":
            return
        status, kind, body = await self._answer(scope)
        headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *HEADERS]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        shown = b"" if scope["method"] == "HEAD" else body
        await send({"type": "http.response.body", "body": shown})

    async def _answer(self, scope: Any) -> tuple[int, bytes, bytes]:
        plain = b"text/plain; charset=utf-8"
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if host.rpartition(":")[0] not in HOSTS and host not in HOSTS:
            return 403, plain, b"This page is for the server's own machine.\n"
        if scope["method"] not in ("GET", "HEAD"):
            return 405, plain, b"This page only shows.\n"
        views: dict[str, tuple[bytes, Callable[[Status], str]]] = {
            "/": (b"text/html; charset=utf-8", as_page),
            "/status.json": (b"application/json", lambda s: json.dumps(s.as_json())),
            "/metrics": (b"text/plain; version=0.0.4; charset=utf-8", as_metrics),
        }
        if scope["path"] not in views:
            return 404, plain, b"There are /, /status.json and /metrics.\n"
        kind, view = views[scope["path"]]
        try:
            return 200, kind, view(await self._current()).encode()
        except UserError as error:
            return 503, plain, f"{error}\n".encode()

    async def _current(self) -> Status:
        # Flower's command takes seconds, so several browsers share one answer.
        async with self._lock:
            if self._status is None or time.monotonic() - self._read_at > REFRESH_S / 2:
                self._status = await asyncio.to_thread(self._read)
                self._read_at = time.monotonic()
            return self._status


def serve(server: ServerFolder, port: int) -> None:
    """Show the state on the loopback interface until the command is stopped.

    Args:
        server: the server's folder.
        port: the port to listen on.
    """
    site = StatusSite(lambda: collect(server))
    uvicorn.run(site, host="127.0.0.1", port=port, log_level="warning", ws="none", lifespan="off")
