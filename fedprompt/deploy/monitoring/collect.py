"""The state of a federation: its nodes, its newest run, and the server's machine.

Runs in `deploy status` on the server's machine, beside `deploy server`. Everything is read from
files that others write, except who is connected, which Flower's own command tells.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedprompt.deploy.flower_commands import run_flwr
from fedprompt.deploy.folders import CONNECTION, ServerFolder
from fedprompt.deploy.joining.server_side import members
from fedprompt.deploy.key_registration import registered_clients
from fedprompt.deploy.node_federation import SITES
from fedprompt.deploy.processes import listens
from fedprompt.deploy.submission import FOLDER
from fedprompt.errors import UserError
from fedprompt.experiment.compose import parse
from fedprompt.reports.run_data import METRICS, SUMMARY, each_line
from fedprompt.runtime.cards import cards
from fedprompt.runtime.peer_text import sanitised


@dataclass(frozen=True)
class NodeStatus:
    """One approved node.

    Attributes:
        client: its client number.
        name: as it was requested; empty if `deploy init` made its key.
        state: `online`, `offline`, `registered` (it has never connected), or `unknown`.
        last_seen: when it was last connected, as Flower prints it; empty if never or now.
        approved_until: as an ISO date; None if for ever.
        policy: SHA-256 of its policy, `none`, or None if it has not said so.
        versions: of the packages that it has reported.
    """

    client: int
    name: str
    state: str
    last_seen: str
    approved_until: str | None
    policy: str | None
    versions: Mapping[str, str]


@dataclass(frozen=True)
class RunStatus:
    """The run that was submitted last.

    Attributes:
        folder: its run folder.
        experiment: its name.
        method: its method.
        rounds: how many it has.
        round: the last one that is over; 0 before the first.
        finished: whether it has ended.
        accepted: updates that have counted, over all rounds.
        dropped: updates that have not.
        curves: points (round, value) by name.
    """

    folder: str
    experiment: str
    method: str
    rounds: int
    round: int
    finished: bool
    accepted: int
    dropped: int
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Status:
    """The state of a federation at one moment.

    Attributes:
        time: when it was read, ISO, UTC.
        running: whether the SuperLink answers.
        nodes: the approved nodes by client.
        run: the newest run; None if there is none.
        disk_free_bytes: on the file system of the server's folder.
        gpus: names of the server's GPUs.
    """

    time: str
    running: bool
    nodes: list[NodeStatus]
    run: RunStatus | None
    disk_free_bytes: int
    gpus: list[str]

    def as_json(self) -> dict[str, Any]:
        """The state as plain JSON."""
        return asdict(self)


def collect(server: ServerFolder) -> Status:
    """Read the state of a federation.

    Args:
        server: the server's folder.

    Raises:
        UserError: a file in the server's folder is damaged.
    """
    run = _newest_run(server)
    sites = {} if run is None else _json(Path(run.folder) / SITES)
    running = listens(server.superlink_port)
    connected = _connected(server) if running else {}
    node_of = {client: node for node, client in registered_clients(server).items()}
    nodes = []
    for member in members(server.path):
        state, seen = connected.get(node_of.get(member.client, 0), ("unknown", ""))
        site = sites.get(str(member.client))
        site = site if isinstance(site, dict) else {}
        policy, versions = site.get("policy"), site.get("versions")
        nodes.append(
            NodeStatus(
                member.client,
                member.name,
                state,
                seen,
                None if member.expires is None else member.expires.date().isoformat(),
                policy if isinstance(policy, str) else None,
                versions if isinstance(versions, dict) else {},
            )
        )
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    free = shutil.disk_usage(server.path).free
    return Status(now, running, nodes, run, free, [card.name for card in cards()])


def _connected(server: ServerFolder) -> dict[int, tuple[str, str]]:
    """State of every registered node id, and when it was last seen."""
    server.prepare()
    arguments = ["supernode", "list", CONNECTION, "--format", "json"]
    output = run_flwr(arguments, server.environment)
    found = re.search(r"\{.*\}", output, re.DOTALL)
    try:
        rows = json.loads(found[0])["nodes"] if found else []
        return {
            int(row["node-id"]): (
                sanitised(str(row["status"]), 40),
                "" if row["status"] == "online" else sanitised(str(row["offline-at"]), 40),
            )
            for row in rows
        }
    except (ValueError, KeyError, TypeError):
        return {}


def _newest_run(server: ServerFolder) -> RunStatus | None:
    files = [p for p in (server.path / FOLDER).glob("*.json") if p.is_file()]
    submitted = sorted(files, key=lambda p: p.stat().st_mtime)
    if not submitted:
        return None
    content = _json(submitted[-1])
    try:
        config = parse(str(content["config"]))
    except (KeyError, UserError):
        return None  # submitted by a version whose experiments this one cannot read
    folder = Path(content.get("resume") or config.output.dir or ".")
    metrics = folder / METRICS
    # The server app creates the file when the first nodes have joined.
    written = each_line(metrics) if metrics.is_file() else iter(())
    lines = [line for line in written if line.get("kind") == "round"]
    counted = [line.get("clients") or {} for line in lines]
    accepted = sum(c.get("accepted", 0) for c in counted)
    return RunStatus(
        str(folder),
        config.experiment,
        config.method.name,
        config.federation.rounds,
        max((line["round"] for line in lines), default=0),
        (folder / SUMMARY).is_file(),
        accepted,
        sum(c.get("sampled", 0) for c in counted) - accepted,
        {
            "loss": _curve(lines, "train", "loss"),
            "global accuracy": _curve(lines, "global", "accuracy"),
            "personal accuracy": _curve(lines, "personal", "mean"),
        },
    )


def _curve(lines: list[dict[str, Any]], part: str, key: str) -> list[tuple[int, float]]:
    values = ((line["round"], (line.get(part) or {}).get(key)) for line in lines)
    known = ((server_round, value) for server_round, value in values if value is not None)
    # JSON has no infinity, and a curve no place for it.
    return [(server_round, float(value)) for server_round, value in known if math.isfinite(value)]


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}
