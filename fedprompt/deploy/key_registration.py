"""Registers the nodes' public keys with the SuperLink. Runs in `deploy server` on the server.

The SuperLink gives every key a random node id. Which client each id belongs to is written to
`nodes.json`, so that a run can refuse a node that claims to be another client.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from fedprompt.deploy.flower_commands import last_words, run_flwr
from fedprompt.deploy.folders import CONNECTION, ServerFolder, public_keys
from fedprompt.errors import UserError
from fedprompt.files import write_bytes

REGISTERED = "nodes.json"


def register_keys(server: ServerFolder, environment: Mapping[str, str]) -> dict[int, int]:
    """Register the keys in the server's folder that the SuperLink does not know yet.

    Args:
        server: the server's folder; its SuperLink must be running.
        environment: variables for Flower's command.

    Returns:
        The client of every registered node id.

    Raises:
        UserError: the SuperLink refuses a key.
    """
    entries = _read(server)
    for client, public in public_keys(server.path).items():
        key = public.read_text()
        # Keys are compared, not clients, so that a node with a new key is registered again.
        if entries.get(str(client), {}).get("key") == key:
            continue
        output = run_flwr(
            ["supernode", "register", str(public), CONNECTION, "--format", "json"], environment
        )
        node = re.search(r'"node-id":\s*"?(\d+)', output)
        if not node:
            raise UserError(f"the SuperLink did not register {public}: {last_words(output)}")
        entries[str(client)] = {"key": key, "node": int(node.group(1))}
        # Written after every key: a key that is registered twice is refused by the SuperLink.
        write_bytes(server.path / REGISTERED, json.dumps(entries, indent=2).encode())
    return _client_of_node(entries)


def registered_clients(server: ServerFolder) -> dict[int, int]:
    """Read the client of every registered node id from `nodes.json`; empty if there is none."""
    return _client_of_node(_read(server))


def _read(server: ServerFolder) -> dict[str, dict[str, Any]]:
    path = server.path / REGISTERED
    entries: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    return entries


def _client_of_node(entries: Mapping[str, Mapping[str, Any]]) -> dict[int, int]:
    return {int(entry["node"]): int(client) for client, entry in entries.items()}
