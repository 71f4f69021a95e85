"""Starts the processes of the server or of a node, restarts those that exit, and ends them all.

Runs in `fedprompt deploy server` and `fedprompt deploy node`, in the foreground of a terminal or of
a service manager, until it is stopped.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedprompt.deploy.addresses import check_host
from fedprompt.deploy.connection import Connection
from fedprompt.deploy.credentials import CA_CERTIFICATE, CERTIFICATE, NODE_PUBLIC
from fedprompt.deploy.diagnosis import find_fault
from fedprompt.deploy.expiry import Expiry
from fedprompt.deploy.folders import SETTINGS, NodeFolder, ServerFolder
from fedprompt.deploy.joining.server_side import members
from fedprompt.deploy.key_registration import register_keys
from fedprompt.deploy.processes import Processes, free_port, listens
from fedprompt.deploy.reach import UNAVAILABLE, call, proxy_variable
from fedprompt.errors import UserError
from fedprompt.runtime.endings import advice, check_signals, command_line
from fedprompt.runtime.peer_text import json_line, wants_json

START_S = 300.0
"""Seconds that a process may take until it listens."""
LOOK_S = 0.5
"""Seconds between two looks at the processes."""
ASK_S = 60.0
"""Seconds between two questions of a node whether the server still lets it in."""
SERVER_PAUSE_S, NODE_PAUSE_S = 3.0, 10.0
"""Seconds before a process is restarted. The SuperLink rejects a node that has crashed for most of
a minute, so a node need not hurry."""
SERVER_PROCESSES = ("superlink", "superexec", "fleet-proxy")


def serve(server: ServerFolder, host: str) -> None:
    """Run the server until it is stopped; it does not return.

    Args:
        server: the server's folder and ports.
        host: the address on which the fleet proxy listens for nodes. All other processes listen on
            the loopback interface only.

    Raises:
        UserError: a port is impossible or in use, a process does not start, or one ends again and
            again.
    """
    host = check_host(host, "--host", listens=True)
    if server.port == server.superlink_port:
        raise UserError(
            f"port {server.port} is the port for nodes and also superlink_port in "
            f"{server.path / SETTINGS}; choose another --port."
        )
    certificates = [server.path / CERTIFICATE, server.path / CA_CERTIFICATE]
    expiry = Expiry(certificates, _print, approvals=lambda: _approvals(server.path))
    expiry.check()
    server.prepare()
    # Checked first: later, a program of somebody else would be taken for ours that listens.
    _refuse_used_port(server.port, "set --port PORT, here and in every node's --server", host)
    _refuse_used_port(server.superlink_port, f"set superlink_port in {server.path / SETTINGS}")
    again = f"start it again with: {command_line()}"
    with advice(lambda: again), Processes(server.path) as processes:
        clients = start_server(processes, server, host, START_S)
        _print(f"ready for {len(clients)} nodes on {host}:{server.port}")
        while True:
            check_signals()
            expiry.mention()
            processes.restart_exited(
                SERVER_PAUSE_S, lambda name, status: _print(processes.exit_line(name, status))
            )
            time.sleep(LOOK_S)


def start_server(
    processes: Processes, server: ServerFolder, host: str, timeout_s: float
) -> dict[int, int]:
    """Start the server's processes and register the nodes' keys.

    Args:
        processes: the group to which the processes are added.
        server: the server's folder and ports.
        host: the address on which the fleet proxy listens for nodes.
        timeout_s: seconds that a process may take until it listens.

    Returns:
        The client of every registered node id.

    Raises:
        UserError: a process does not start, or the SuperLink refuses a key.
    """
    start_superlink(processes, server, timeout_s)
    # Keys are registered before the proxy opens, so that no node is rejected as unknown.
    clients = register_keys(server, {**processes.environment, **server.environment})
    processes.start("superexec", server.superexec_command(), server.environment)
    processes.start("fleet-proxy", server.fleet_proxy_command(host))
    processes.wait_until(lambda: listens(server.port, host), "starting the fleet proxy", timeout_s)
    # Listening is not enough: only an answer of the SuperLink shows that nodes get through.
    gate, authority = f"127.0.0.1:{server.port}", server.path / CA_CERTIFICATE
    if listens(server.port):  # it may listen on another address only
        processes.wait_until(
            lambda: call(gate, authority) not in (None, UNAVAILABLE),
            "a call through the fleet proxy",
            timeout_s,
        )
    return clients


def start_superlink(processes: Processes, server: ServerFolder, timeout_s: float) -> None:
    """Start the SuperLink and wait until it listens; it continues with the database that it finds.

    Args:
        processes: the group to which the process is added.
        server: the server's folder and ports.
        timeout_s: seconds that the SuperLink may take.

    Raises:
        UserError: the SuperLink does not start.
    """
    processes.start("superlink", server.superlink_command(), server.environment)
    processes.wait_until(
        lambda: listens(server.superlink_port), "starting the SuperLink", timeout_s
    )


def run_node(node: NodeFolder, settings: Mapping[str, Any], port: int | None) -> None:
    """Run a node, that is, its SuperNode and its worker, until it is stopped; it does not return.

    Args:
        node: the node's folder and the server's address.
        settings: the node's own settings, see node_config.py; they stay on the node.
        port: port on the loopback interface for the SuperNode's children; None uses a free one.

    Raises:
        UserError: the port is in use, the certificate is not valid now, a setting cannot be passed
            to Flower, or a process ends again and again.
    """
    if port is not None:
        _refuse_used_port(port, "set another --port, or leave it out to use any free one")
    authority = node.path / CA_CERTIFICATE
    until = node.approved_until
    approval = {} if until is None else {"the approval of this node": until}
    expiry = Expiry([authority], _print, approvals=lambda: approval)
    expiry.check()
    again = f"start it again with: {command_line()}"
    with advice(lambda: again), Processes(node.path) as processes:
        # Created before the SuperNode starts, because it skips the lines that the log already has.
        connection = Connection(
            processes.log("supernode"),
            node.server,
            _print,
            answers=lambda: call(node.server, authority) is not None,
            find_fault=lambda: find_fault(node.server, authority, node.path / NODE_PUBLIC),
            proxy=proxy_variable(node.server),
        )

        def report(name: str, status: int) -> bool:
            if name == "supernode":
                return connection.report_exit(name, status)
            _print(processes.exit_line(name, status))
            return False

        command = node.supernode_command(settings, port or free_port())
        # The worker first, because a message that arrives before it listens has to wait for it.
        processes.start("worker", node.worker_command())
        processes.start("supernode", command, node.environment)
        _print(f"client {node.client} connects to {node.server}; logs are in {processes.logs}")
        connection.report_fault()
        asked = time.monotonic()
        while True:
            check_signals()
            expiry.mention()
            processes.restart_exited(NODE_PAUSE_S, report)
            connection.update()
            if time.monotonic() - asked > ASK_S:
                # The SuperNode says nothing about calls that the proxy refuses.
                asked = time.monotonic()
                connection.report_fault()
            time.sleep(LOOK_S)


def _approvals(server: Path) -> dict[str, datetime.datetime]:
    """Until when the nodes are approved that are not approved for ever."""
    return {
        f"the approval of client {member.client} ({member.name})": member.expires
        for member in members(server)
        if member.expires is not None
    }


def _refuse_used_port(port: int, advice: str, host: str = "127.0.0.1") -> None:
    if listens(port, host):
        raise UserError(f"port {port} is in use by another program; stop that program or {advice}.")


def _print(line: str) -> None:
    if wants_json():
        line = json_line(line, "INFO", "fedprompt.deploy", time.time())
    print(line, flush=True)  # without flush, a service manager's journal would lag behind
