"""A federation's folder: what the server and each node need, and the commands that they run.

authority/   ca.crt ca.key             keep offline; needed again for a new server certificate
server/      ca.crt server.crt server.key nodes/node-<k>.pub federation.json
             later: state.db nodes.json flower/ logs/
node-<k>/    ca.crt node.key node.pub federation.json
             later: state/ (private prompts) cache/ flower/
README.md    what to copy where, and the commands
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from fedprompt.deploy.credentials import (
    CA_CERTIFICATE,
    CERTIFICATE,
    KEY,
    NODE_KEY,
    NODE_PUBLIC,
    write_authority,
    write_node_key,
    write_server_certificate,
)
from fedprompt.errors import UserError
from fedprompt.files import write_bytes

SETTINGS, CONNECTION = "federation.json", "fedprompt"
GATE_PORT, SUPERLINK_PORT = 9092, 8000
LOCAL = ("localhost", "127.0.0.1")
LONGEST_SOCKET = 100
"""Bytes of a socket's path; Unix allows 107."""


@dataclass(frozen=True)
class ServerSite:
    """The server's folder and ports: `port` for the nodes, `superlink_port` on loopback only."""

    folder: Path
    port: int = GATE_PORT
    superlink_port: int = SUPERLINK_PORT

    @property
    def connection(self) -> str:
        """`config.toml` of Flower's own commands."""
        return (
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{self.superlink_port}"\n'
            f"root-certificates = {json.dumps(str(self.folder / CA_CERTIFICATE))}\n"
        )

    @property
    def environment(self) -> dict[str, str]:
        """Where Flower keeps its files on the server."""
        return {"FLWR_HOME": str(self.folder / "flower")}

    def superlink(self) -> list[str]:
        """The command of the SuperLink; its database lets it survive a restart."""
        return [
            "flower-superlink",
            *("--ssl-ca-certfile", str(self.folder / CA_CERTIFICATE)),
            *("--ssl-certfile", str(self.folder / CERTIFICATE)),
            *("--ssl-keyfile", str(self.folder / KEY)),
            "--enable-supernode-auth",
            *("--isolation", "process"),
            *("--database", str(self.folder / "state.db")),
            *("--host", "127.0.0.1"),
            *("--port", str(self.superlink_port)),
        ]

    def superexec(self) -> list[str]:
        """The command of the SuperExec, which starts the server app; not the SuperLink's child."""
        return [
            "flower-superexec",
            *("--runtime-api-address", f"127.0.0.1:{self.superlink_port}"),
            *("--root-certificates", str(self.folder / CA_CERTIFICATE)),
        ]

    def gate(self, host: str = "127.0.0.1") -> list[str]:
        """The command of the gate, which nodes reach on `host`."""
        return [
            *(sys.executable, "-m", "fedprompt", "deploy", "gate", str(self.folder)),
            *("--host", host, "--port", str(self.port)),
            *("--superlink-port", str(self.superlink_port)),
        ]

    def prepare(self) -> None:
        """Write Flower's connection file."""
        home = self.folder / "flower"
        home.mkdir(parents=True, exist_ok=True)
        write_bytes(home / "config.toml", self.connection.encode())


@dataclass(frozen=True)
class NodeSite:
    """A node's folder, the server's address and this node's client."""

    folder: Path
    server: str
    client: int

    @property
    def environment(self) -> dict[str, str]:
        """Where Flower keeps its files on the node."""
        return {"FLWR_HOME": str(self.folder / "flower")}

    @property
    def worker_socket(self) -> Path:
        """Where the node's warm process listens: in its folder, if a socket's path may be so long.

        Else below the system's folder for temporary files, in a folder of this user's own.
        """
        path = self.folder / "worker.sock"
        if len(os.fsencode(path)) <= LONGEST_SOCKET:
            return path
        name = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"fedprompt-{os.getuid()}" / f"{name}.sock"

    def worker(self) -> list[str]:
        """The command of the warm process."""
        return [sys.executable, "-m", "fedprompt", "deploy", "worker", str(self.worker_socket)]

    def supernode(self, settings: Mapping[str, Any], port: int) -> list[str]:
        """The command of the SuperNode.

        Args:
            settings: `--node-config` beyond the client's number; None = left out.
            port: for the node's own tasks, on loopback.
        """
        node_config = {
            "partition-id": self.client,
            "state-dir": str(self.folder / "state"),
            "cache-dir": str(self.folder / "cache"),
            "worker": str(self.worker_socket),
        } | {k: v for k, v in settings.items() if v is not None}
        return [
            "flower-supernode",
            *("--root-certificates", str(self.folder / CA_CERTIFICATE)),
            *("--superlink", self.server),
            *("--auth-supernode-private-key", str(self.folder / NODE_KEY)),
            *("--port", str(port)),
            *("--node-config", as_node_config(node_config)),
        ]


def as_node_config(settings: Mapping[str, Any]) -> str:
    """Flower's `--node-config`: `key=value` pairs, texts in TOML quotes.

    Raises:
        UserError: a text that Flower's reader would tear apart.
    """
    pairs = []
    for key, value in settings.items():
        if isinstance(value, str) and ("'" in value or '"' in value or "\n" in value):
            raise UserError(f"{key} is {value!r}; Flower takes no quotes in a node's settings.")
        pairs.append(f"{key}={json.dumps(value, ensure_ascii=False)}")
    return " ".join(pairs)


def init(folder: Path, hosts: Sequence[str], nodes: int, port: int, days: int) -> None:
    """Write everything that a federation needs.

    Args:
        folder: must not hold a federation yet.
        hosts: names and addresses by which nodes reach the server; nodes use the first.
        nodes: number of nodes.
        port: the server's port for the nodes.
        days: how long certificates are valid.

    Raises:
        UserError: the folder is in use, or a host is no name or address.
    """
    for host in hosts:
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.:-]*[A-Za-z0-9])?", host):
            raise UserError(f"{host!r} is no host name or address.")
    if (folder / "authority").exists() or (folder / "server").exists():
        raise UserError(f"{folder} already holds a federation; choose another folder.")
    authority, server = folder / "authority", folder / "server"
    write_authority(authority, days)
    write_server_certificate(authority, server, list(dict.fromkeys([*hosts, *LOCAL])), days)
    _write(server / SETTINGS, {"port": port, "superlink_port": SUPERLINK_PORT})
    for client in range(nodes):
        add_node(folder, client, f"{_in_url(hosts[0])}:{port}")
    write_bytes(folder / "README.md", readme(hosts[0], port, nodes).encode())


def add_node(folder: Path, client: int, server: str) -> None:
    """Keys and settings of one more node."""
    node = folder / f"node-{client}"
    write_node_key(node)
    public = (node / NODE_PUBLIC).read_bytes()
    registered = folder / "server" / "nodes"
    registered.mkdir(exist_ok=True)
    write_bytes(registered / f"node-{client}.pub", public)
    write_bytes(node / CA_CERTIFICATE, (folder / "authority" / CA_CERTIFICATE).read_bytes())
    _write(node / SETTINGS, {"server": server, "client": client})


def read_server(folder: Path) -> ServerSite:
    """The server's settings in its folder.

    Raises:
        UserError: not a folder of `fedprompt deploy init`.
    """
    found = _read(folder, {"port": int, "superlink_port": int})
    return ServerSite(folder.resolve(), found["port"], found["superlink_port"])


def read_node_site(folder: Path) -> NodeSite:
    """A node's settings in its folder.

    Raises:
        UserError: not a folder of `fedprompt deploy init`.
    """
    found = _read(folder, {"server": str, "client": int})
    return NodeSite(folder.resolve(), found["server"], found["client"])


def public_keys(server: Path) -> dict[int, Path]:
    """The public key of every client, as they lie in the server's folder."""
    matches = ((re.fullmatch(r"node-(\d+)\.pub", p.name), p) for p in (server / "nodes").glob("*"))
    return {int(m.group(1)): path for m, path in sorted(matches, key=lambda x: x[1].name) if m}


def readme(host: str, port: int, nodes: int) -> str:
    """What to copy where, and the commands."""
    text = resources.files("fedprompt.deploy").joinpath("federation.md").read_text("utf-8")
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


def quoted(command: Sequence[str]) -> str:
    """A command as a shell takes it."""
    return shlex.join(command)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _write(path: Path, values: Mapping[str, Any]) -> None:
    write_bytes(path, (json.dumps(values, indent=2) + "\n").encode())


def _read(folder: Path, types: Mapping[str, type]) -> dict[str, Any]:
    path = folder / SETTINGS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(found[name], kind) for name, kind in types.items()):
            return {name: found[name] for name in types}
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; is {folder} from 'fedprompt deploy init'?"
        ) from None
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is damaged: it must hold {', '.join(types)}.")
