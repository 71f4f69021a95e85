"""What nodes reach from outside: Flower's Fleet API, and nothing else of the SuperLink.

Flower 1.41 serves all of a SuperLink on one port. Nodes sign every call to its Fleet API with their
keys. Its Control API (start runs, that is, run code on the server and on all nodes; register
keys) and its Runtime API ask for nothing in the open-source build. So the SuperLink listens on the
loopback interface, and this gate, with the same certificate, passes on `POST /v1/fleet/...` only.
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
"""Largest request that is passed on; Flower cuts larger messages into pieces."""
DROPPED = {b"host", b"connection", b"transfer-encoding", b"content-length", b"keep-alive"}
log = logging.getLogger("fedprompt.gate")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Gate:
    """An ASGI application in front of the SuperLink at `upstream`, an https:// address."""

    def __init__(self, upstream: str, authority: Path, *, max_bytes: int = MAX_BYTES) -> None:
        context = ssl.create_default_context(cafile=str(authority))
        self.client = httpx.AsyncClient(base_url=upstream, verify=context, timeout=60.0)
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or refuse it."""
        if scope["type"] != "http":
            return
        path, peer = str(scope["path"]), (scope.get("client") or ("?",))[0]
        raw = bytes(scope.get("raw_path") or path.encode())
        if scope["method"] != "POST" or not passes(path) or raw != path.encode():
            log.warning("refused %s %s from %s", scope["method"], path[:100], peer)
            await _answer(send, 404, b"")
            return
        body = await self._body(receive)
        if body is None:
            log.warning("refused a request of more than %d bytes from %s", self.max_bytes, peer)
            await _answer(send, 413, b"")
            return
        headers = [(k, v) for k, v in scope["headers"] if k.lower() not in DROPPED]
        try:
            answer = await self.client.post(path, content=body, headers=headers)
        except httpx.HTTPError as error:
            log.warning("the SuperLink does not answer: %s", type(error).__name__)
            await _answer(send, 503, b"")
            return
        kept = [(k, v) for k, v in answer.headers.raw if k.lower() not in DROPPED]
        kept = [(k, v) for k, v in kept if k.lower() != b"content-encoding"]
        await _answer(send, answer.status_code, answer.content, kept)

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole request, or None where it is too long."""
        parts: list[bytes] = []
        size = 0
        while True:
            event = await receive()
            if event["type"] != "http.request":
                return b""
            parts.append(event.get("body", b""))
            size += len(parts[-1])
            if size > self.max_bytes:
                return None
            if not event.get("more_body"):
                return b"".join(parts)


def passes(path: str) -> bool:
    """Whether a path is one of the Fleet API: one plain word behind its prefix."""
    name = path.removeprefix(FLEET)
    return path.startswith(FLEET) and name.replace("-", "").isalnum() and name.isascii()


def serve(folder: Path, host: str, port: int, superlink_port: int) -> None:
    """Listen on `host:port` with the certificate in `folder`; does not return."""
    gate = Gate(f"https://127.0.0.1:{superlink_port}", folder / CA_CERTIFICATE)
    uvicorn.run(
        gate,
        host=host,
        port=port,
        ssl_certfile=str(folder / CERTIFICATE),
        ssl_keyfile=str(folder / KEY),
        log_level="warning",
        access_log=False,
        lifespan="off",
    )


async def _answer(
    send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send(
        {"type": "http.response.start", "status": status, "headers": [*(headers or []), length]}
    )
    await send({"type": "http.response.body", "body": body})
