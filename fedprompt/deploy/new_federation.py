"""Writes the folders of a new federation (`deploy init`). Runs on the administrator's terminal.

authority/   ca.crt ca.key             kept offline; needed again for a new server certificate
server/      for the server, see folders.py
node-<k>/    for node k, see folders.py
README.md    which folder belongs on which machine, and the commands to run there

The keys of these nodes are all created on this one machine and are then copied to the others, which
suits a trial. Nodes that make their own keys join later (`fedprompt.deploy.joining`).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from fedprompt.deploy.addresses import check_host, check_port, in_url
from fedprompt.deploy.credentials import (
    CA_CERTIFICATE,
    CERTIFICATE,
    KEY,
    NODE_PUBLIC,
    check_days,
    hosts_of,
    renew_authority,
    validity,
    write_authority,
    write_node_key,
    write_server_certificate,
)
from fedprompt.deploy.folders import SETTINGS, SUPERLINK_PORT
from fedprompt.errors import UserError
from fedprompt.files import write_bytes

LOOPBACK = ("localhost", "127.0.0.1")
"""Names by which processes on the server's machine reach it, always in its certificate."""

AUTHORITY_DAYS = 3650
"""How long the authority's certificate is valid at least: every node has a copy, so it is renewed
more rarely than the server's."""


def create_federation(folder: Path, hosts: Sequence[str], nodes: int, port: int, days: int) -> None:
    """Write certificates, keys and settings for one server and its nodes.

    Args:
        folder: where the folders are written; it must not contain a federation yet.
        hosts: names and IP addresses by which nodes reach the server; nodes use the first one.
        nodes: number of nodes.
        port: the server's port for the nodes.
        days: how long the server's certificate is valid.

    Raises:
        UserError: the folder contains a federation or files that one would overwrite, a host is
            neither a name nor an address, or the port or the days are impossible.
    """
    # A host is written into certificates, URLs and the commands of README.md.
    hosts = [check_host(host, "--host") for host in hosts]
    if check_port(port, "--port") == SUPERLINK_PORT:
        raise UserError(
            f"--port is {port}, which is the SuperLink's own port on the server; choose another."
        )
    check_days(days)
    written = ["authority", "server", "README.md", *(f"node-{k}" for k in range(nodes))]
    if taken := next((name for name in written if (folder / name).exists()), None):
        raise UserError(
            f"{folder} already contains {taken!r}, which would be overwritten; choose another "
            "folder."
        )
    authority, server = folder / "authority", folder / "server"
    write_authority(authority, max(days, AUTHORITY_DAYS))
    write_server_certificate(authority, server, list(dict.fromkeys([*hosts, *LOOPBACK])), days)
    _write_settings(server / SETTINGS, {"port": port, "superlink_port": SUPERLINK_PORT})
    for client in range(nodes):
        add_node(folder, client, f"{in_url(hosts[0])}:{port}")
    write_bytes(folder / "README.md", instructions(hosts[0], port, nodes).encode())


def add_node(folder: Path, client: int, server: str) -> None:
    """Write keys and settings of one more node.

    Args:
        folder: the federation's folder, with `authority` and `server` in it.
        client: the number of the client that the node is.
        server: the server's address, `host:port`.
    """
    node = folder / f"node-{client}"
    write_node_key(node)
    public = (node / NODE_PUBLIC).read_bytes()
    registered = folder / "server" / "nodes"
    registered.mkdir(exist_ok=True)
    write_bytes(registered / f"node-{client}.pub", public)
    write_bytes(node / CA_CERTIFICATE, (folder / "authority" / CA_CERTIFICATE).read_bytes())
    _write_settings(node / SETTINGS, {"server": server, "client": client})


def renew_federation(folder: Path, days: int) -> list[str]:
    """Issue the server's certificate again, for the same hosts and with a new key.

    The authority's certificate is issued again too if it expires before that date; its key stays.

    Args:
        folder: the federation's folder, with `authority` and `server` in it.
        days: how long the server's new certificate is valid.

    Returns:
        What to do next, one line each.

    Raises:
        UserError: the folder has no authority or no certificate of the server, or a file cannot be
            written.
    """
    check_days(days)
    authority, server = folder / "authority", folder / "server"
    hosts = hosts_of(server / CERTIFICATE)
    _, end = validity(authority / CA_CERTIFICATE)
    until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    renews_authority = end < until
    if renews_authority:
        renew_authority(authority, max(days, AUTHORITY_DAYS))
    write_server_certificate(authority, server, hosts, days)
    steps = [
        f"{server / CERTIFICATE} is valid until {until:%Y-%m-%d}, for {', '.join(hosts)}",
        f"copy {CERTIFICATE}, {KEY} and {CA_CERTIFICATE} of {server} into the server's folder on "
        "its machine, and restart 'fedprompt deploy server'",
    ]
    if renews_authority:
        for node in sorted(folder.glob("node-*")):
            write_bytes(node / CA_CERTIFICATE, (authority / CA_CERTIFICATE).read_bytes())
        steps.append(
            f"the authority's certificate is new as well: copy {authority / CA_CERTIFICATE} into "
            "every node's folder on its machine, and restart 'fedprompt deploy node'"
        )
    return steps


def instructions(host: str, port: int, nodes: int) -> str:
    """Markdown text that says which folder to copy to which machine, and which commands to run.

    Args:
        host: the name or address by which nodes reach the server.
        port: the server's port for the nodes.
        nodes: number of nodes.
    """
    page = "federation.md" if nodes else "joining.md"
    text = resources.files("fedprompt.deploy").joinpath(page).read_text("utf-8")
    copies = "\n".join(f"scp -pr node-{k} NODE{k}:federation/node-{k}" for k in range(nodes))
    starts = "\n".join(
        f"fedprompt deploy node federation/node-{k} --data /path/to/images   # on NODE{k}"
        for k in range(nodes)
    )
    values = {"HOST": host, "PORT": str(port), "NODES": str(nodes), "COPIES": copies}
    values["STARTS"] = starts
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def _write_settings(path: Path, values: Mapping[str, Any]) -> None:
    write_bytes(path, (json.dumps(values, indent=2) + "\n").encode())
