"""Registers the nodes' public keys with the SuperLink. Runs in `deploy server` on the server.

The SuperLink gives every key a random node id. Which client each id belongs to is written to
`nodes.json`, so that a run can refuse a node that claims to be another client.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from filelock import FileLock

from fedprompt.deploy.flower_commands import last_words, run_flwr
from fedprompt.deploy.folders import CONNECTION, ServerFolder, public_keys
from fedprompt.deploy.joining.server_side import shut_out
from fedprompt.errors import UserError
from fedprompt.files import write_bytes

REGISTERED = "nodes.json"
NODE_ID = r'"node-id":\s*"?(\d+)'
"""Where the id of a node is in the output of Flower's commands."""


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
    # `deploy server`, `approve` and `revoke` may run at the same time.
    with FileLock(server.path / f"{REGISTERED}.lock"):
        return _register_keys(server, environment)


def _register_keys(server: ServerFolder, environment: Mapping[str, str]) -> dict[int, int]:
    entries = _read(server)
    _unregister_revoked(server, entries, environment)
    for client, public in public_keys(server.path).items():
        key = public.read_text()
        # Keys are compared, not clients, so that a node with a new key is registered again.
        if entries.get(str(client), {}).get("key") == key:
            continue
        output = run_flwr(
            ["supernode", "register", str(public), CONNECTION, "--format", "json"], environment
        )
        found = re.findall(NODE_ID, output)
        if not found:
            # A process that was killed here may have registered the key and not noted it.
            found = _unnoted(entries, environment)
        if len(found) != 1:
            raise UserError(f"the SuperLink did not register {public}: {last_words(output)}")
        entries[str(client)] = {"key": key, "node": int(found[0])}
        # After every key, so that at most one key is registered and not noted.
        write_bytes(server.path / REGISTERED, json.dumps(entries, indent=2).encode())
    return _client_of_node(entries)


def _unnoted(entries: Mapping[str, Mapping[str, Any]], environment: Mapping[str, str]) -> list[str]:
    """Ids of nodes that the SuperLink knows and `nodes.json` does not."""
    listed = run_flwr(["supernode", "list", CONNECTION, "--format", "json"], environment)
    noted = {str(entry["node"]) for entry in entries.values()}
    return [node for node in re.findall(NODE_ID, listed) if node not in noted]


def _unregister_revoked(
    server: ServerFolder, entries: dict[str, dict[str, Any]], environment: Mapping[str, str]
) -> None:
    """Make the SuperLink forget nodes whose keys are revoked; the proxy refuses them already."""
    revoked = set(shut_out(server.path))
    for client, entry in list(entries.items()):
        if entry["key"].strip() not in revoked:
            continue
        # Its answer does not matter: that it does not know the node is just as good.
        run_flwr(["supernode", "unregister", str(entry["node"]), CONNECTION], environment)
        del entries[client]
        write_bytes(server.path / REGISTERED, json.dumps(entries, indent=2).encode())


def registered_clients(server: ServerFolder) -> dict[int, int]:
    """Read the client of every registered node id from `nodes.json`; empty if there is none."""
    return _client_of_node(_read(server))


def _read(server: ServerFolder) -> dict[str, dict[str, Any]]:
    path = server.path / REGISTERED
    try:
        entries: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
        if not all({"key", "node"} <= set(entry) for entry in entries.values()):
            raise ValueError("incomplete")
    except (OSError, ValueError, AttributeError, TypeError):
        raise UserError(
            f"{path} is damaged. It says which node has which key; restore it, or remove it "
            f"together with {server.path / 'state.db'} and let the server register all nodes again."
        ) from None
    return entries


def _client_of_node(entries: Mapping[str, Mapping[str, Any]]) -> dict[int, int]:
    return {int(entry["node"]): int(client) for client, entry in entries.items()}
