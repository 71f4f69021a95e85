"""Which calls of the SuperLink the fleet proxy forwards, and how much it reads from whom."""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from uvicorn.server import ServerState

from fedprompt.deploy import callers, fleet_proxy
from fedprompt.deploy.callers import PUBLIC_KEY, SIGNATURE, TIMESTAMP, Callers
from fedprompt.deploy.credentials import CA_CERTIFICATE, write_node_key
from fedprompt.deploy.fleet_proxy import (
    MAX_LINES,
    FleetProxy,
    ImpatientProtocol,
    Limit,
    is_fleet_call,
)
from fedprompt.deploy.joining.member_keys import MemberKeys
from fedprompt.deploy.new_federation import create_federation
from fedprompt.errors import UserError

Headers = list[tuple[bytes, bytes]]
MANY = 300_000_000
PUSH = "/v1/fleet/push-object"


@pytest.mark.parametrize(
    ("path", "forwarded"),
    [
        ("/v1/fleet/pull-messages", True),
        ("/v1/fleet/push-object", True),
        ("/v1/control/start-run", False),
        ("/v1/control/register-node", False),
        ("/v1/runtime/acquire-task", False),
        ("/v1/fleet/../control/start-run", False),
        ("/v1/fleet/%2e%2e/control/start-run", False),
        ("/v1/fleet//control", False),
        ("/v1/fleet/", False),
        ("/docs", False),
        ("/", False),
    ],
)
def test_only_calls_of_the_fleet_api_are_forwarded(path: str, forwarded: bool) -> None:
    assert is_fleet_call(path) is forwarded


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gate") / "federation"
    create_federation(path, ["127.0.0.1"], nodes=1, port=9092, days=1)
    return path


def signed(node: Path) -> Headers:
    """The headers with which Flower's SuperNode signs a call."""
    key = load_ssh_private_key((node / "node.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    request = httpx.Request("POST", "https://server/")
    context: Any = SimpleNamespace(request=request)
    NodeAuthHttpInterceptor(key, key.public_key()).intercept(context, cast("Any", lambda _: None))
    return [(k.lower(), v) for k, v in request.headers.raw if k.lower().startswith(b"flwr-")]


class Gate:
    """A fleet proxy with a SuperLink that notes what it is sent."""

    def __init__(self, federation: Path, **limits: Limit) -> None:
        server = federation / "server"
        known = Callers(MemberKeys(server).read)
        self.proxy = FleetProxy("https://superlink", server / CA_CERTIFICATE, known, **limits)
        self.forwarded: list[bytes] = []
        self.pieces_read = 0

        def superlink(request: httpx.Request) -> httpx.Response:
            self.forwarded.append(request.content)
            return httpx.Response(200, content=b"answer")

        self.proxy.client = httpx.AsyncClient(
            base_url="https://superlink", transport=httpx.MockTransport(superlink)
        )

    def call(
        self, headers: Headers, pieces: Iterable[bytes], path: str = PUSH, method: str = "POST"
    ) -> int:
        """The status of the answer to a request whose body arrives in pieces.

        After the last piece, nothing more comes from the caller, unless the piece is empty.
        """
        sent: list[MutableMapping[str, Any]] = []
        remaining = iter(pieces)

        async def receive() -> MutableMapping[str, Any]:
            piece = next(remaining, None)
            if piece is None:
                await asyncio.Event().wait()
            assert piece is not None
            self.pieces_read += 1
            return {"type": "http.request", "body": piece, "more_body": piece != b""}

        async def send(event: MutableMapping[str, Any]) -> None:
            sent.append(event)

        scope = {"type": "http", "method": method, "path": path, "headers": headers,
                 "client": ("10.0.0.9", 1)}  # fmt: skip
        asyncio.run(self.proxy(scope, receive, send))
        if sent[0]["status"] != 200 and path != "/":
            assert (b"connection", b"close") in sent[0]["headers"]
        return int(sent[0]["status"])


def test_a_stranger_can_send_little(federation: Path) -> None:
    gate = Gate(federation)
    length = (b"content-length", str(MANY).encode())
    assert gate.call([length], [b"x" * 1000]) == 413
    assert gate.pieces_read == 0
    # A body in pieces declares no length.
    assert gate.call([], (b"x" * 10_000 for _ in range(30_000))) == 413
    assert gate.pieces_read == 2
    assert gate.forwarded == []
    assert gate.call([], [b"small", b""]) == 200  # the SuperLink tells the node that it is unknown
    assert gate.forwarded == [b"small"]


def test_a_node_can_send_an_update_but_not_anything(federation: Path) -> None:
    gate, headers = Gate(federation), signed(federation / "node-0")
    assert gate.call(headers, [b"x" * 6_000_000, b""]) == 200
    assert [len(body) for body in gate.forwarded] == [6_000_000]
    length = (b"content-length", str(MANY).encode())
    gate.pieces_read = 0
    assert gate.call([*headers, length], [b"x"]) == 413
    assert gate.pieces_read == 0


@pytest.mark.parametrize("who", ["stranger", "node"])
def test_a_body_that_does_not_come_is_not_waited_for(federation: Path, who: str) -> None:
    gate = Gate(federation, **{who: Limit(1000, 0.01)})
    headers = signed(federation / "node-0") if who == "node" else []
    assert gate.call(headers, [b"half"]) == 408
    assert gate.forwarded == []


def test_only_a_nodes_own_fresh_signature_counts(
    federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Callers(MemberKeys(federation / "server").read)
    good = dict(signed(federation / "node-0"))
    assert known.knows(good.items())
    write_node_key(tmp_path)
    other = dict(signed(tmp_path))
    now = datetime.datetime.now(datetime.UTC)
    old = (now - datetime.timedelta(minutes=10)).isoformat().encode()
    for wrong in (
        {},
        other,
        {**good, SIGNATURE: other[SIGNATURE]},
        {**good, TIMESTAMP: now.isoformat().encode()},
        {**good, TIMESTAMP: old},
        {**good, TIMESTAMP: b"2026-01-01T00:00:00"},
        {**good, TIMESTAMP: "yesterday ü".encode()},
        {**good, SIGNATURE: b"***"},
        {**good, PUBLIC_KEY: b"\xff"},
        {k: v for k, v in good.items() if k != SIGNATURE},
    ):
        assert not known.knows(wrong.items()), wrong
    monkeypatch.setattr(callers, "TOLERANCE_S", -1.0)
    assert not known.knows(good.items())


def test_a_damaged_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes" / "node-0.pub").write_text("nothing")
    with pytest.raises(UserError, match=r"node-0\.pub"):
        Callers(MemberKeys(tmp_path).read)


def test_a_nodes_look_at_certificate_and_clock_is_no_refusal(
    federation: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert Gate(federation).call([], [], "/", "GET") == 404
    assert caplog.messages == []


def test_refusals_cannot_fill_or_forge_the_log(
    federation: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(federation)
    with caplog.at_level(logging.WARNING):
        for _ in range(MAX_LINES + 50):
            assert gate.call([], [], "/v1/\n\x1b[2Jforged" + "x" * 5000) == 404
    assert len(caplog.messages) == MAX_LINES
    assert all(line.isprintable() and len(line) < 300 for line in caplog.messages)


class Clock:
    """A loop whose timers are run by hand."""

    def __init__(self) -> None:
        self.timers: list[tuple[float, Any]] = []

    def call_later(self, delay: float, callback: Any) -> Any:
        timer = (delay, callback)
        self.timers.append(timer)
        return SimpleNamespace(cancel=lambda: self.timers.remove(timer))

    def create_task(self, coroutine: Any, **_: Any) -> Any:
        coroutine.close()
        return Mock()  # the task, which is not run


class Line(asyncio.Transport):
    """A connection that notes whether it was closed."""

    aborted = False

    def abort(self) -> None:
        self.aborted = True

    def close(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None:
        pass


@pytest.fixture
def connection() -> tuple[ImpatientProtocol, Clock, Line]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        pass

    clock, line = Clock(), Line()
    config = uvicorn.Config(app, lifespan="off", ws="none")
    protocol = ImpatientProtocol(config, ServerState(), {}, cast("Any", clock))
    protocol.connection_made(line)
    return protocol, clock, line


@pytest.mark.parametrize("start", [b"", b"P", b"POST /v1/fleet/x HTTP/1.1\r\nHost: a\r\n"])
def test_half_a_request_does_not_keep_its_connection(
    connection: tuple[ImpatientProtocol, Clock, Line], start: bytes
) -> None:
    protocol, clock, line = connection
    for byte in start:  # a byte at a time does not start the wait again
        protocol.data_received(bytes([byte]))
    ((delay, callback),) = clock.timers
    assert delay == fleet_proxy.HEAD_TIMEOUT_S
    callback()
    assert line.aborted


def test_a_complete_head_ends_the_wait(
    connection: tuple[ImpatientProtocol, Clock, Line],
) -> None:
    protocol, clock, _ = connection
    protocol.data_received(b"POST /v1/fleet/x HTTP/1.1\r\nHost: a\r\n")
    protocol.data_received(b"Content-Length: 5\r\n\r\nab")
    assert clock.timers == []
    protocol.connection_lost(None)
    assert clock.timers == []
