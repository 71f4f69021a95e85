"""A reverse proxy that lets nodes reach Flower's Fleet API and nothing else of the SuperLink.

Runs on the server, in a process that `deploy server` starts. Flower 1.41 serves all APIs of a
SuperLink on one port. Nodes sign every call of the Fleet API with their keys. The Control API
(which starts runs, that is, runs code on the server and on all nodes, and registers keys) and the
Runtime API do not authenticate callers in the open-source build. The SuperLink therefore listens on
the loopback interface only, and this proxy, which has the same certificate, forwards requests for
`POST /v1/fleet/...` and refuses all others.

Whoever reaches the port can send requests. Before a caller has shown a node's signature, it can
therefore only send a few bytes within a few seconds: enough for the calls with which a SuperNode
learns that its key is unknown.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import h11  # comes with uvicorn
import httpx
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedprompt.deploy.callers import SHUT_OUT, Callers
from fedprompt.deploy.credentials import CA_CERTIFICATE, CERTIFICATE, KEY
from fedprompt.deploy.joining.member_keys import MemberKeys

FLEET = "/v1/fleet/"
HOP_BY_HOP = {b"host", b"connection", b"transfer-encoding", b"content-length", b"keep-alive"}
"""Headers that describe one connection and must not be copied to the next one."""
SUPERLINK_TIMEOUT_S = 60.0
HEAD_TIMEOUT_S = 10.0
"""Seconds in which the head of a request must arrive; TLS handshakes have a limit of their own."""
MAX_CONNECTIONS = 800
"""Connections that are served at the same time; a process may usually open 1024 files."""
MAX_LINES = 100
"""Refusals that are logged one by one; after these, every hundredth is."""
log = logging.getLogger("fedprompt.fleet_proxy")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Limit(NamedTuple):
    """How much a caller may send in one request, and how long it may take."""

    bytes: int
    seconds: float


NODE = Limit(64 * 1024 * 1024, 600.0)
"""For nodes. Flower splits arrays into pieces of 5 MB; a masked update is one piece, with 4 bytes
per parameter."""
STRANGER = Limit(16 * 1024, 10.0)
"""For callers without a node's signature."""


class _Disconnected(Exception):
    """The caller has closed the connection before its request was complete."""


class FleetProxy:
    """An ASGI application in front of a SuperLink.

    Args:
        upstream: the SuperLink's address, `https://host:port`.
        authority: the certificate that the SuperLink's certificate must be issued by.
        callers: tells nodes from other callers.
        node: the limit for nodes; a longer body is refused with status 413, a slower one with 408.
        stranger: the limit for other callers.
    """

    def __init__(
        self,
        upstream: str,
        authority: Path,
        callers: Callers,
        *,
        node: Limit = NODE,
        stranger: Limit = STRANGER,
    ) -> None:
        context = ssl.create_default_context(cafile=str(authority))
        # One client for all requests, so that connections to the SuperLink are reused.
        self.client = httpx.AsyncClient(
            base_url=upstream,
            verify=context,
            timeout=SUPERLINK_TIMEOUT_S,
            # The SuperLink is on this machine; no proxy of the environment lies between.
            trust_env=False,
        )
        self.callers, self.node, self.stranger = callers, node, stranger
        self._refusals = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward or refuse one request; the arguments are those of the ASGI protocol."""
        if scope["type"] != "http":
            return
        path = str(scope["path"])
        if scope["method"] == "GET" and path == "/":
            # A node that looks at the certificate, the date and the status (diagnosis.py).
            is_out = self.callers.refuses(scope["headers"])
            await _respond(send, SHUT_OUT if is_out else 404, b"")
            return
        raw = bytes(scope.get("raw_path") or path.encode())
        # A percent-encoded path could mean another path to the SuperLink than it does here.
        if scope["method"] != "POST" or not is_fleet_call(path) or raw != path.encode():
            await self._refuse(scope, send, 404, "is no call of the Fleet API")
            return
        if self.callers.refuses(scope["headers"]):
            await self._refuse(scope, send, SHUT_OUT, "is of a node that has been shut out")
            return
        limit = self.node if self.callers.knows(scope["headers"]) else self.stranger
        try:
            async with asyncio.timeout(limit.seconds):
                body = await _body(scope, receive, limit.bytes)
        except _Disconnected:
            return
        except TimeoutError:
            await self._refuse(scope, send, 408, f"did not arrive within {limit.seconds:g} s")
            return
        if body is None:
            await self._refuse(scope, send, 413, f"has more than {limit.bytes} bytes")
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

    async def _refuse(self, scope: Scope, send: Send, status: int, reason: str) -> None:
        self._refusals += 1
        # Anybody can cause a refusal, so their number must not fill the disk.
        if self._refusals <= MAX_LINES or self._refusals % MAX_LINES == 0:
            # As literals, because a path may contain line breaks and other control characters.
            what = f"{scope['method'][:20]!a} {scope['path'][:100]!a}"
            peer = (scope.get("client") or ("?",))[0]
            log.warning("refusal %d: %s from %s %s", self._refusals, what, peer, reason)
        # What the caller still wants to send is never read.
        await _respond(send, status, b"", [(b"connection", b"close")])


class ImpatientProtocol(H11Protocol):
    """HTTP on a connection that is closed if the head of a request does not arrive in time.

    uvicorn itself waits without a limit for the first byte, and for the rest of a head.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for the first head."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Stop waiting once a head is complete, and wait again for the rest of the next one."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        self._cancel()

    def _watch(self) -> None:
        # h11 calls a peer idle until the head of its request is complete.
        if self.conn.their_state is not h11.IDLE:
            self._cancel()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


async def _body(scope: Scope, receive: Receive, max_bytes: int) -> bytes | None:
    """The complete body of a request, or None if it is longer than `max_bytes`."""
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    # The HTTP parser has checked that these are digits.
    if int(declared) > max_bytes:
        return None
    body = bytearray()
    while True:
        event = await receive()
        if event["type"] != "http.request":
            raise _Disconnected
        body += event.get("body", b"")
        # The size is also checked while the body arrives: a chunked one declares no length.
        if len(body) > max_bytes:
            return None
        if not event.get("more_body"):
            return bytes(body)


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
    callers = Callers(MemberKeys(folder).read)
    proxy = FleetProxy(f"https://127.0.0.1:{superlink_port}", folder / CA_CERTIFICATE, callers)
    uvicorn.run(
        proxy,
        host=host,
        port=port,
        ssl_certfile=str(folder / CERTIFICATE),
        ssl_keyfile=str(folder / KEY),
        http=ImpatientProtocol,
        ws="none",
        limit_concurrency=MAX_CONNECTIONS,
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
