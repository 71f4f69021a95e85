"""The server's and a node's folder: where their files are, and the commands that run in them.

`fedprompt deploy init` (new_federation.py) writes these folders; each is copied to its machine and
is then read there by `deploy server`, `deploy node` and `deploy run`:

server/      ca.crt server.crt server.key nodes/node-<k>.pub federation.json
             added later: state.db nodes.json flower/ logs/ submitted/ owner.json
node-<k>/    ca.crt node.key node.pub federation.json
             added later: state/ (private prompts) records/ (audit log, privacy ledger) cache/
             flower/ logs/ worker.sock owner.json
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedprompt.deploy.addresses import check_port, check_server
from fedprompt.deploy.credentials import CA_CERTIFICATE, CERTIFICATE, KEY, NODE_KEY
from fedprompt.deploy.joining.documents import parse_date
from fedprompt.errors import UserError
from fedprompt.files import write_bytes

SETTINGS, CONNECTION = "federation.json", "fedprompt"
FLEET_PORT, SUPERLINK_PORT = 9092, 8000
SERVER_FOLDER = "FEDPROMPT_SERVER"
"""Environment variable with the server's folder, for the server app that the SuperExec starts."""
MAX_SOCKET_PATH = 100
"""Bytes of a socket's path; Unix allows 107."""


@dataclass(frozen=True)
class ServerFolder:
    """The server's folder and its ports.

    Args:
        path: the folder.
        port: the fleet proxy's port, which nodes connect to.
        superlink_port: the SuperLink's port, on the loopback interface only.
    """

    path: Path
    port: int = FLEET_PORT
    superlink_port: int = SUPERLINK_PORT

    @property
    def flower_config(self) -> str:
        """The `config.toml` in which Flower's own commands look for the SuperLink's address."""
        return (
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{self.superlink_port}"\n'
            f"root-certificates = {json.dumps(str(self.path / CA_CERTIFICATE))}\n"
        )

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that make Flower, and our server app, use the files in here."""
        return {"FLWR_HOME": str(self.path / "flower"), SERVER_FOLDER: str(self.path)}

    def superlink_command(self) -> list[str]:
        """The command of the SuperLink, whose database lets runs survive its restart."""
        return [
            "flower-superlink",
            *("--ssl-ca-certfile", str(self.path / CA_CERTIFICATE)),
            *("--ssl-certfile", str(self.path / CERTIFICATE)),
            *("--ssl-keyfile", str(self.path / KEY)),
            "--enable-supernode-auth",
            # In Flower's default isolation, the server app is a child of the SuperLink, and a run
            # ends when the SuperLink crashes.
            *("--isolation", "process"),
            *("--database", str(self.path / "state.db")),
            # The Control and Runtime APIs on this port do not authenticate their callers.
            *("--host", "127.0.0.1"),
            *("--port", str(self.superlink_port)),
        ]

    def superexec_command(self) -> list[str]:
        """The command of the SuperExec, which starts the server app of a run.

        It is not a child of the SuperLink, so that a run continues while the SuperLink restarts.
        """
        return [
            "flower-superexec",
            *("--runtime-api-address", f"127.0.0.1:{self.superlink_port}"),
            *("--root-certificates", str(self.path / CA_CERTIFICATE)),
        ]

    def fleet_proxy_command(self, host: str = "127.0.0.1") -> list[str]:
        """The command of the fleet proxy, which listens for nodes.

        Args:
            host: the address that it listens on.
        """
        return [
            # The command `fedprompt` need not be on PATH, so the module is named.
            *(sys.executable, "-m", "fedprompt", "deploy", "fleet-proxy", str(self.path)),
            *("--host", host, "--port", str(self.port)),
            *("--superlink-port", str(self.superlink_port)),
        ]

    def prepare(self) -> None:
        """Write `flower_config` where Flower's commands read it."""
        home = self.path / "flower"
        home.mkdir(parents=True, exist_ok=True)
        write_bytes(home / "config.toml", self.flower_config.encode())


@dataclass(frozen=True)
class NodeFolder:
    """A node's folder.

    Args:
        path: the folder.
        server: the server's address, `host:port`.
        client: the number of the client that this node is, 0 .. K - 1.
        approved_until: until when the server lets the node in, if it has said so.
    """

    path: Path
    server: str
    client: int
    approved_until: datetime.datetime | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that make Flower keep its files in this folder."""
        return {"FLWR_HOME": str(self.path / "flower")}

    @property
    def worker_socket(self) -> Path:
        """The socket on which the node's worker listens.

        The socket is in this folder. If that path is too long for a socket, it is in a folder of
        this user below the system's folder for temporary files.
        """
        path = self.path / "worker.sock"
        if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
            return path
        # Derived from the path, so that SuperNode and worker agree on it without a message.
        name = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"fedprompt-{os.getuid()}" / f"{name}.sock"

    def worker_command(self) -> list[str]:
        """The command of the worker, the process that holds PyTorch and CLIP."""
        return [sys.executable, "-m", "fedprompt", "deploy", "worker", str(self.worker_socket)]

    def supernode_command(self, settings: Mapping[str, Any], port: int) -> list[str]:
        """The command of the SuperNode.

        Args:
            settings: entries of `--node-config` (see node_config.py) that differ from the defaults
                for this folder; an entry that is None is ignored.
            port: port on the loopback interface for the child processes of the SuperNode.

        Raises:
            UserError: a value cannot be passed through Flower's command line.
        """
        node_config = {
            "partition-id": self.client,
            "state-dir": str(self.path / "state"),
            "cache-dir": str(self.path / "cache"),
            "records": str(self.path / "records"),
            "server": self.server,
            "worker": str(self.worker_socket),
        } | {k: v for k, v in settings.items() if v is not None}
        return [
            "flower-supernode",
            *("--root-certificates", str(self.path / CA_CERTIFICATE)),
            *("--superlink", self.server),
            *("--auth-supernode-private-key", str(self.path / NODE_KEY)),
            *("--port", str(port)),
            *("--node-config", format_node_config(node_config)),
        ]


def format_node_config(settings: Mapping[str, Any]) -> str:
    """Flower's `--node-config`: pairs `key=value`, with texts in TOML quotes.

    Raises:
        UserError: a text holds quotes or line breaks, which Flower's parser would misread.
    """
    pairs = []
    for key, value in settings.items():
        if isinstance(value, str) and ("'" in value or '"' in value or "\n" in value):
            raise UserError(
                f"{key} is {value!r}; Flower does not accept quotes or line breaks in a node's "
                "settings. Rename the folder or file."
            )
        # A JSON string is a TOML basic string; JSON numbers and booleans are TOML's as well.
        pairs.append(f"{key}={json.dumps(value, ensure_ascii=False)}")
    return " ".join(pairs)


def read_server_folder(path: Path) -> ServerFolder:
    """Read the settings in the server's folder.

    Args:
        path: the folder, which contains `federation.json`.

    Returns:
        The folder's absolute path and the server's ports.

    Raises:
        UserError: `fedprompt deploy init` did not write this folder, or its settings are damaged.
    """
    settings = _read_settings(path, {"port": int, "superlink_port": int})
    ports = [check_port(value, f"{path / SETTINGS}: {name}") for name, value in settings.items()]
    return ServerFolder(path.resolve(), *ports)


def read_node_folder(path: Path) -> NodeFolder:
    """Read the settings in a node's folder.

    Args:
        path: the folder, which contains `federation.json`.

    Returns:
        The folder's absolute path, the server's address and the node's client.

    Raises:
        UserError: `fedprompt deploy init` did not write this folder, or its settings are damaged.
    """
    settings = _read_settings(path, {"server": str, "client": int})
    server = check_server(settings["server"], f"{path / SETTINGS}: server")
    until = _read_settings(path, {}, {"approved_until": str}).get("approved_until")
    try:
        approved = None if until is None else parse_date(until)
    except ValueError:
        raise UserError(f"{path / SETTINGS} is damaged: approved_until is no date.") from None
    return NodeFolder(path.resolve(), server, settings["client"], approved)


def public_keys(server: Path) -> dict[int, Path]:
    """The files with the nodes' public keys in the server's folder, by client."""
    matches = ((re.fullmatch(r"node-(\d+)\.pub", p.name), p) for p in (server / "nodes").glob("*"))
    return {int(m.group(1)): path for m, path in sorted(matches, key=lambda x: x[1].name) if m}


def _read_settings(
    folder: Path, types: Mapping[str, type], optional: Mapping[str, type] = MappingProxyType({})
) -> dict[str, Any]:
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        # Values of a wrong type fall through to the error at the end, like damaged JSON.
        if all(isinstance(settings[name], kind) for name, kind in types.items()):
            present = {n for n, kind in optional.items() if isinstance(settings.get(n), kind)}
            return {name: settings[name] for name in {**types, **dict.fromkeys(present)}}
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; {folder} must be a folder that 'fedprompt "
            "deploy init' has written."
        ) from None
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is damaged: it must contain {', '.join(types)}.")
