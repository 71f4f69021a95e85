"""A node joins with a key that it makes itself, and is shut out again."""

from __future__ import annotations

import datetime
import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedprompt import files
from fedprompt.deploy import credentials, expiry
from fedprompt.deploy.callers import Callers
from fedprompt.deploy.folders import ServerFolder, public_keys, read_node_folder, read_server_folder
from fedprompt.deploy.joining import documents, node_side, server_side
from fedprompt.deploy.joining.member_keys import MemberKeys
from fedprompt.deploy.joining.node_side import join, make_request
from fedprompt.deploy.joining.server_side import approve, members, revoke
from fedprompt.deploy.new_federation import create_federation
from fedprompt.errors import UserError
from tests.deploy.test_fleet_proxy import Gate, signed


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    create_federation(tmp_path / "federation", ["fed.example.org"], nodes=0, port=9555, days=40)
    return tmp_path / "federation"


@pytest.fixture
def server(federation: Path) -> ServerFolder:
    return read_server_folder(federation / "server")


def joined(server: ServerFolder, folder: Path, name: str) -> Path:
    """The folder of a node that has joined."""
    request = make_request(folder, name)
    _, package, code = approve(server, request, folder.with_suffix(".package"))
    assert join(folder, package) == code
    return folder


def test_from_nothing_to_approved_in_two_commands_on_each_side(
    server: ServerFolder, tmp_path: Path
) -> None:
    node = tmp_path / "node"
    request = make_request(node, "University of Ä")
    member, package, code = approve(server, request, tmp_path / "package.json")
    assert (member.client, member.name) == (0, "University of Ä")
    assert join(node, package) == code
    folder = read_node_folder(node)
    assert (folder.server, folder.client) == ("fed.example.org:9555", 0)
    assert folder.approved_until == member.expires
    assert (node / "ca.crt").read_bytes() == (server.path / "ca.crt").read_bytes()
    # The private key stays: neither file holds a part of it.
    assert stat.S_IMODE((node / "node.key").stat().st_mode) == 0o600
    secret = (node / "node.key").read_text().split("\n")[1:-2]
    for sent in (request, package):
        assert "PRIVATE" not in sent.read_text()
        assert not any(line in sent.read_text() for line in secret)
    assert (server.path / "server.key").read_text().split("\n")[1] not in package.read_text()
    # The server lets exactly this key in.
    assert public_keys(server.path)[0].read_text() == (node / "node.pub").read_text()
    callers = Callers(MemberKeys(server.path).read)
    assert callers.knows(signed(node))


def test_numbers_are_free_ones_and_stay_with_their_keys(
    server: ServerFolder, tmp_path: Path
) -> None:
    requests = [make_request(tmp_path / f"node-{k}", f"site {k}") for k in range(3)]
    out = tmp_path / "package.json"
    assert [approve(server, r, out)[0].client for r in requests[:2]] == [0, 1]
    assert approve(server, requests[0], out, days=3)[0].client == 0, "renewed, not new"
    with pytest.raises(UserError, match="client 0 already"):
        approve(server, requests[0], out, client=5)
    with pytest.raises(UserError, match="site 1"):
        approve(server, requests[2], out, client=1)
    revoke(server, "site 0")
    assert approve(server, requests[2], out)[0].client == 0
    assert [m.name for m in members(server.path)] == ["site 2", "site 1"]


def test_a_revoked_node_is_shut_out_at_once_and_for_ever(
    federation: Path, server: ServerFolder, tmp_path: Path
) -> None:
    good, bad = (joined(server, tmp_path / name, name) for name in ("good", "bad"))
    gate = Gate(federation)
    assert [gate.call(signed(node), [b"body", b""]) for node in (good, bad)] == [200, 200]
    assert revoke(server, "bad").client == 1
    # The same proxy, which has not been restarted.
    assert [gate.call(signed(node), [b"body", b""]) for node in (good, bad)] == [200, 403]
    assert [gate.call(signed(node), [], "/", "GET") for node in (good, bad)] == [404, 403]
    with pytest.raises(UserError, match="revoked"):
        approve(server, bad / "request.json", tmp_path / "package.json")
    for unknown in ("bad", "7"):
        with pytest.raises(UserError, match="good"):
            revoke(server, unknown)


def test_an_approval_expires_and_says_so_thirty_days_before(
    federation: Path, server: ServerFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = joined(server, tmp_path / "node", "site")
    (member,) = members(server.path)
    assert member.expires is not None
    lines: list[str] = []
    for days, said in ((31, 0), (29, 1), (-1, 1)):
        now = member.expires - datetime.timedelta(days=days)
        lines.clear()
        expiry.Expiry(
            [],
            lines.append,
            lambda now=now: now,
            approvals=lambda: {"the approval": member.expires},
        ).mention()
        assert len(lines) == said
    assert "deploy approve" in lines[0]
    path = server.path / "nodes" / "node-0.json"
    details = json.loads(path.read_text())
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=1)
    path.write_text(json.dumps(details | {"expires": past.isoformat()}))
    assert Gate(federation).call(signed(node), [b"body", b""]) == 403
    approve(server, node / "request.json", tmp_path / "again.json")
    assert Gate(federation).call(signed(node), [b"body", b""]) == 200


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_changed_file_is_refused(server: ServerFolder, tmp_path: Path) -> None:
    node, other = tmp_path / "node", tmp_path / "other"
    request, out = make_request(node, "site"), tmp_path / "package.json"
    foreign = make_request(other, "other")
    key = json.loads(foreign.read_text())["public_key"]
    for change in (
        lambda c: c.update(name="another"),
        lambda c: c.update(public_key=key),
        lambda c: c.update(signature="00"),
        lambda c: c.update(signature="no hex"),
        lambda c: c.pop("name"),
        lambda c: c.update(kind="something else"),
        lambda c: c.update(name=3),
        lambda c: c.update(public_key="\ud800"),
    ):
        make_request(node, "site")
        changed(request, change)
        with pytest.raises(UserError) as error:
            approve(server, request, out)
        assert "\n" not in str(error.value)
    assert members(server.path) == []
    _, package, code = approve(server, make_request(node, "site"), out)
    good = package.read_text()
    create_federation(tmp_path / "evil", ["evil.example.org"], nodes=0, port=9555, days=40)
    evil = read_server_folder(tmp_path / "evil" / "server")
    for change in (
        lambda c: c.update(server="evil.example.org:9555"),
        lambda c: c.update(client=7),
        lambda c: c.update(client=-5),
        lambda c: c.update(expires="2027-01-01"),
        lambda c: c.update(authority=(evil.path / "ca.crt").read_text()),
        lambda c: c.update(certificate=(evil.path / "server.crt").read_text()),
        lambda c: c.update(authority="nothing"),
    ):
        package.write_text(good)
        changed(package, change)
        with pytest.raises(UserError):
            join(node, package)
    package.write_text(good)
    with pytest.raises(UserError, match="another node"):
        join(other, package)
    assert not (node / "federation.json").exists()
    # Somebody who replaces request and package on their way is found by the code alone.
    _, forged, _ = approve(evil, request, tmp_path / "forged.json")
    assert join(node, forged) != code


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff" * 9, b"<html>", b"[" * 99_999])
def test_what_is_no_request_is_one_line(
    server: ServerFolder, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "request.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"request\.json"):
        approve(server, path, tmp_path / "out")


def test_a_folder_belongs_to_one_federation(server: ServerFolder, tmp_path: Path) -> None:
    node = joined(server, tmp_path / "node", "site")
    with pytest.raises(UserError, match="has joined"):
        make_request(node, "site")
    create_federation(tmp_path / "second", ["b.example.org"], nodes=0, port=9555, days=40)
    second = read_server_folder(tmp_path / "second" / "server")
    _, package, _ = approve(second, node / "request.json", tmp_path / "p.json")
    with pytest.raises(UserError, match="another federation"):
        join(node, package)
    for name in ("", "x" * 101, "two\nlines"):
        with pytest.raises(UserError, match="--name"):
            make_request(tmp_path / "new", name)


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours catches it."""


def test_no_kill_between_two_steps_loses_or_breaks_anything(
    server: ServerFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command is killed before each of its writes in turn, and then repeated."""
    left = [0]

    def dying(*arguments: Any, **named: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        files.write_bytes(*arguments, **named)

    for module in (credentials, documents, node_side, server_side):
        monkeypatch.setattr(module, "write_bytes", dying)

    def survive(command: Callable[[], Any]) -> Any:
        """The result of a command that is killed at its first write, then at its second, ..."""
        for writes in range(1, 20):
            left[0] = writes
            try:
                return command()
            except Killed:
                continue
        pytest.fail("the command never ended")

    node, out = tmp_path / "node", tmp_path / "package.json"
    request = survive(lambda: make_request(node, "site"))
    key = (node / "node.key").read_bytes()
    member, package, code = survive(lambda: approve(server, request, out))
    assert member.client == 0
    assert survive(lambda: join(node, package)) == code
    assert (node / "node.key").read_bytes() == key
    callers = Callers(MemberKeys(server.path).read)
    assert callers.knows(signed(node))
    survive(lambda: revoke(server, "site"))
    assert members(server.path) == []
    assert callers.refuses(signed(node))
    left[0] = 0  # no more kills at writes
    # Killed after the key was noted as revoked: it is shut out although its file is still there.
    other = joined(server, tmp_path / "other", "other site")
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        revoke(server, "other site")
    assert callers.refuses(signed(other))
    assert not callers.knows(signed(other))


def test_a_damaged_file_does_not_stop_the_proxy(
    server: ServerFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = joined(server, tmp_path / "node", "site")
    callers = Callers(MemberKeys(server.path).read)
    (server.path / "nodes" / "node-7.pub").write_text("nothing")
    assert callers.knows(signed(node))
    assert "node-7.pub" in caplog.text or "damaged" in caplog.text
    with pytest.raises(UserError):
        Callers(MemberKeys(replace(server).path).read)


def test_a_shut_out_node_does_not_get_in_by_naming_two_keys(
    federation: Path, server: ServerFolder, tmp_path: Path
) -> None:
    good, bad = (joined(server, tmp_path / name, name) for name in ("good", "bad"))
    gate = Gate(federation)
    revoke(server, "bad")
    own, others = signed(bad), [h for h in signed(good) if h[0] == b"flwr-public-key"]
    for headers in (own + others, others + own, own + own):
        assert gate.call(headers, [b"body", b""]) == 403
    assert gate.forwarded == []


def test_names_and_comments_make_no_other_node(server: ServerFolder, tmp_path: Path) -> None:
    node = tmp_path / "node"
    request = make_request(node, "site")
    out = tmp_path / "package.json"
    approve(server, request, out)
    # The same key with a comment is the same node.
    key = credentials.read_private_key(node / "node.key")
    public = f"{(node / 'node.pub').read_text().strip()} a comment"
    documents.write_document(
        request, node_side.REQUEST, {"name": "site", "public_key": public}, key
    )
    assert approve(server, request, out)[0].client == 0
    assert len(members(server.path)) == 1
    for name in ("7", "site"):
        other = make_request(tmp_path / "other", "other")
        other_key = credentials.read_private_key(tmp_path / "other" / "node.key")
        public = (tmp_path / "other" / "node.pub").read_text().strip()
        documents.write_document(
            other, node_side.REQUEST, {"name": name, "public_key": public}, other_key
        )
        with pytest.raises(UserError, match=name):
            approve(server, other, out)
    with pytest.raises(UserError, match="--name"):
        make_request(tmp_path / "number", "7")
    revoke(server, "0")
    with pytest.raises(UserError, match="revoked"):
        approve(server, request, out)
