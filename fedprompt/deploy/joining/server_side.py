"""`deploy approve` and `deploy revoke`: the server's part of joining. Runs on the server.

In the server's folder, `nodes/node-<k>.pub` is the key of client k, `nodes/node-<k>.json` says who
it is and until when it is approved, and `nodes/revoked/` holds the keys that are shut out. The
fleet proxy reads these files again whenever they change, so both commands take effect at once.
"""

from __future__ import annotations

import datetime
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedprompt.deploy.addresses import check_host, in_url
from fedprompt.deploy.credentials import (
    CA_CERTIFICATE,
    CERTIFICATE,
    KEY,
    check_days,
    fingerprint,
    hosts_of,
    key_to_ssh,
    parse_public_key,
    read_server_key,
)
from fedprompt.deploy.folders import ServerFolder, public_keys
from fedprompt.deploy.joining.documents import (
    check_signature,
    code_of,
    parse_date,
    read_document,
    write_document,
)
from fedprompt.deploy.joining.node_side import PACKAGE, PACKAGE_KEYS, REQUEST, REQUEST_KEYS
from fedprompt.errors import UserError
from fedprompt.files import write_bytes
from fedprompt.runtime.peer_text import sanitised

REVOKED = "revoked"
"""Folder of the keys that are shut out, in `nodes/`."""


@dataclass(frozen=True)
class Member:
    """A node that the server knows.

    Attributes:
        client: its client number.
        name: as it was requested; empty if `deploy init` made the key.
        public_key: in OpenSSH's format.
        expires: until when it is approved; None if it is for ever.
    """

    client: int
    name: str
    public_key: str
    expires: datetime.datetime | None


def members(server: Path) -> list[Member]:
    """The nodes that are approved, expired ones included, by client.

    Args:
        server: the server's folder.

    Raises:
        UserError: a file is damaged.
    """
    return [_member(client, public) for client, public in public_keys(server).items()]


def shut_out(server: Path) -> list[str]:
    """The public keys, in OpenSSH's format, that have been revoked."""
    files = sorted((server / "nodes" / REVOKED).glob("*.pub"))
    return [file.read_bytes().decode(errors="replace").strip() for file in files]


def approve(
    server: ServerFolder,
    request: Path,
    out: Path | None,
    *,
    days: int = 365,
    client: int | None = None,
    host: str | None = None,
) -> tuple[Member, Path, str]:
    """Let a node into the federation, and write the package that is returned to it.

    A node that is approved already keeps its number; its approval is renewed.

    Args:
        server: the server's folder.
        request: the node's request file; every byte of it is untrusted.
        out: the package file to write; None writes `package-<k>.json` in the current folder.
        days: how long the approval holds.
        client: the client number that the node gets; None takes the first free one.
        host: the name under which the node reaches the server; None takes the first one of the
            server's certificate.

    Returns:
        The node, the package file, and the code that both sides must compare.

    Raises:
        UserError: the request is damaged or changed, its key has been revoked, the number is taken,
            or a file cannot be written.
    """
    check_days(days)
    content = read_document(request, REQUEST, REQUEST_KEYS)
    key = parse_public_key(content["public_key"].encode(), request)
    check_signature(request, content, key)
    # A comment or white space beside the key must not make another one of it.
    name, public = sanitised(content["name"]), key_to_ssh(key)
    if name.isdecimal():
        raise UserError(
            f"{request}: a name that is a number, {name!r}, could be taken for a client."
        )
    host = (
        check_host(host, "--host") if host is not None else hosts_of(server.path / CERTIFICATE)[0]
    )
    expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    with _lock(server.path):
        if public in shut_out(server.path):
            raise UserError(
                f"the key in {request} has been revoked; ask for a request with a new key "
                "('fedprompt deploy request' in a new folder)."
            )
        number = _number(server.path, public, client)
        if any(m.name == name and m.client != number for m in members(server.path)):
            raise UserError(f"{request}: another node is called {name!r}; ask for another name.")
        package = {
            "name": name,
            "public_key": public,
            "client": number,
            "server": f"{in_url(host)}:{server.port}",
            "authority": (server.path / CA_CERTIFICATE).read_text(),
            "certificate": (server.path / CERTIFICATE).read_text(),
            "expires": expires.isoformat(timespec="seconds"),
        }
        assert set(package) == set(PACKAGE_KEYS)
        out = out or Path(f"package-{number}.json")
        write_document(out, PACKAGE, package, read_server_key(server.path / KEY))
        # The key last: a node that is let in always has a package, and a record of who it is.
        details = {"name": name, "expires": package["expires"]}
        _write(_file(server.path, number, "json"), json.dumps(details, indent=2) + "\n")
        _write(_file(server.path, number, "pub"), public + "\n")
    return _member(number, _file(server.path, number, "pub")), out, code_of(package)


def revoke(server: ServerFolder, node: str) -> Member:
    """Shut a node out.

    Args:
        server: the server's folder.
        node: its client number or its name.

    Returns:
        The node.

    Raises:
        UserError: there is no such node, several have this name, or a file cannot be written.
    """
    with _lock(server.path):
        known = members(server.path)
        numbered = [m for m in known if node == str(m.client)]
        found = numbered or [m for m in known if node == m.name]
        if len(found) != 1:
            names = ", ".join(f"{m.client} ({m.name or 'no name'})" for m in known) or "none"
            raise UserError(
                f"{len(found) or 'no'} nodes are called {node!r}; give a client's number. Approved "
                f"are: {names}."
            )
        (member,) = found
        # First the key among the revoked ones: from now on the proxy refuses it, also if what
        # follows does not happen.
        key = parse_public_key(member.public_key.encode(), Path(member.name))
        name = f"{fingerprint(key)[:16]}.pub"
        _write(server.path / "nodes" / REVOKED / name, member.public_key + "\n")
        _file(server.path, member.client, "pub").unlink(missing_ok=True)
        _file(server.path, member.client, "json").unlink(missing_ok=True)
    return member


def _number(server: Path, public: str, wanted: int | None) -> int:
    """The client number of a node: its present one, the wanted one, or the first free one."""
    taken = {m.client: m for m in members(server)}
    present = next((k for k, m in taken.items() if m.public_key == public), None)
    if present is not None:
        if wanted not in (None, present):
            raise UserError(f"this node is client {present} already; leave --client out.")
        return present
    if wanted is None:
        return next(k for k in itertools.count() if k not in taken)
    if wanted in taken:
        whose = taken[wanted].name or "another node"
        raise UserError(f"--client {wanted} is {whose}; choose another number.")
    return wanted


def _member(client: int, public: Path) -> Member:
    details: dict[str, Any] = {}
    path = public.with_suffix(".json")
    try:
        key = public.read_text().strip()
        if path.is_file():
            details = json.loads(path.read_bytes())
        expires = details.get("expires")
        until = None if expires is None else parse_date(expires)
        return Member(client, str(details.get("name", "")), key, until)
    except OSError as error:
        raise UserError(f"cannot read {public}: {error.strerror}.") from None
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged; approve this node again.") from None


def _file(server: Path, client: int, suffix: str) -> Path:
    return server / "nodes" / f"node-{client}.{suffix}"


def _lock(server: Path) -> FileLock:
    (server / "nodes").mkdir(exist_ok=True)
    return FileLock(server / "nodes" / ".lock")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        write_bytes(path, text.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from None
