"""A reverse proxy that lets nodes reach Flower's Fleet API and nothing else of the SuperLink.

Runs on the server, in a process that `deploy server` starts. Flower 1.41 serves all APIs of a
SuperLink on one port. Nodes sign every call of the Fleet API with their keys. The Control API
(which starts runs, that is, runs code on the server and on all nodes, and registers keys) and the
Runtime API do not authenticate callers in the open-source build. The SuperLink therefore listens on
the loopback interface only, and this proxy, which has the same certificate, forwards requests for
`POST /v1/fleet/...` and refuses all others.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from fedprompt.deploy.credentials import CA_CERTIFICATE, CERTIFICATE, KEY

FLEET = "/v1/fleet/"
MAX_BYTES = 512 * 1024 * 1024
"""Largest request that is forwarded; Flower splits larger messages."""
HOP_BY_HOP = {b"host", b"connection", b"transfer-encoding", b"content-length", b"keep-alive"}
"""Headers that describe one connection and must not be copied to the next one."""
SUPERLINK_TIMEOUT_S = 60.0
log = logging.getLogger("fedprompt.fleet_proxy")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class FleetProxy:
    """An ASGI application in front of a SuperLink.

    Args:
        upstream: the SuperLink's address, `https://host:port`.
        authority: the certificate that the SuperLink's certificate must be issued by.
        max_bytes: requests with a longer body are refused with status 413.
    """

    def __init__(self, upstream: str, authority: Path, *, max_bytes: int = MAX_BYTES) -> None:
        context = ssl.create_default_context(cafile=str(authority))
        # One client for all requests, so that connections to the SuperLink are reused.
        self.client = httpx.AsyncClient(
            base_url=upstream, verify=context, timeout=SUPERLINK_TIMEOUT_S
        )
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward or refuse one request; the arguments are those of the ASGI protocol."""
        if scope["type"] != "http":
            return
        path, peer = str(scope["path"]), (scope.get("client") or ("?",))[0]
        raw = bytes(scope.get("raw_path") or path.encode())
        # A percent-encoded path could mean another path to the SuperLink than it does here.
        if scope["method"] != "POST" or not is_fleet_call(path) or raw != path.encode():
            log.warning("refused %s %s from %s", scope["method"], path[:100], peer)
            await _respond(send, 404, b"")
            return
        body = await self._body(receive)
        if body is None:
            log.warning("refused a request of more than %d bytes from %s", self.max_bytes, peer)
            await _respond(send, 413, b"")
            return
        headers = [(k, v) for k, v in scope["headers"] if k.lower() not in HOP_BY_HOP]
        try:
            answer = await self.client.post(path, content=body, headers=headers)
        except httpx.HTTPError as error:
            log.warning("the SuperLink does not answer: %s", type(error).__name__)
            await _respond(send, 503, b"")
            return
        # httpx has already decompressed the content, so its encoding no longer applies.
        dropped = HOP_BY_HOP | {b"content-encoding"}
        headers = [(k, v) for k, v in answer.headers.raw if k.lower() not in dropped]
        await _respond(send, answer.status_code, answer.content, headers)

    async def _body(self, receive: Receive) -> bytes | None:
        """The complete body of the request, or None if it is too long."""
        parts: list[bytes] = []
        size = 0
        while True:
            event = await receive()
            if event["type"] != "http.request":
                return b""
            parts.append(event.get("body", b""))
            # The size is checked while the body arrives: a declared length need not be true.
            size += len(parts[-1])
            if size > self.max_bytes:
                return None
            if not event.get("more_body"):
                return b"".join(parts)


def is_fleet_call(path: str) -> bool:
    """Whether a path names a call of the Fleet API: its prefix and then a single plain word."""
    name = path.removeprefix(FLEET)
    # `isalnum` alone would accept letters and digits of every script.
    return path.startswith(FLEET) and name.replace("-", "").isalnum() and name.isascii()


def serve(folder: Path, host: str, port: int, superlink_port: int) -> None:
    """Listen for nodes; does not return.

    Args:
        folder: the server's folder, with `server.crt`, `server.key` and `ca.crt`.
        host: address to listen on.
        port: port to listen on, the only one that nodes use.
        superlink_port: the SuperLink's port on the loopback interface.
    """
    proxy = FleetProxy(f"https://127.0.0.1:{superlink_port}", folder / CA_CERTIFICATE)
    uvicorn.run(
        proxy,
        host=host,
        port=port,
        ssl_certfile=str(folder / CERTIFICATE),
        ssl_keyfile=str(folder / KEY),
        log_level="warning",
        access_log=False,
        # The proxy has no start-up or shutdown events.
        lifespan="off",
    )


async def _respond(
    send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send(
        {"type": "http.response.start", "status": status, "headers": [*(headers or []), length]}
    )
    await send({"type": "http.response.body", "body": body})
