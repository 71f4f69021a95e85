"""A whole federation on this machine: real processes on loopback, with TLS and node keys."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedprompt.config.schema import Config
from fedprompt.deploy import submit
from fedprompt.deploy.folders import SETTINGS, NodeSite, ServerSite, init, read_node_site
from fedprompt.deploy.processes import Processes, free_port, listens
from fedprompt.errors import UserError
from fedprompt.experiment.display import Display
from fedprompt.files import write_bytes

START_S = 120.0
DAYS = 30
NODE_PAUSE_S = 10.0
SERVER_PROCESSES = ("superlink", "superexec", "gate")


class LocalFederation:
    """One SuperLink, SuperExec and gate, and N SuperNodes; a context that ends them all.

    Args:
        folder: for certificates, keys, logs and the nodes' own folders; used again on a resume.
        nodes: number of nodes.
        environment: settings of all processes beyond this one's own.
    """

    def __init__(
        self, folder: Path, nodes: int, environment: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder.resolve()
        self.nodes = nodes
        if not (self.folder / "server" / SETTINGS).is_file():
            init(self.folder, ["127.0.0.1"], nodes, free_port(), DAYS)
        # Ports are those that are free now: nobody has kept them for us since the last time.
        self.site = ServerSite(self.folder / "server", free_port(), free_port())
        self.site.prepare()
        self.processes = Processes(self.folder / "logs", environment)
        self.environment = {**self.processes.environment, **self.site.environment}

    def __enter__(self) -> LocalFederation:
        return self

    def __exit__(self, *_: object) -> None:
        self.processes.stop()

    def start_server(self) -> None:
        """Start the server's processes and register the nodes' keys.

        Raises:
            UserError: one of them does not come up.
        """
        self.start_superlink()
        submit.register(self.site, self.environment)
        self.processes.start("superexec", self.site.superexec(), self.site.environment)
        self.start_gate()

    def start_superlink(self) -> None:
        """Start the SuperLink and wait until it listens; also again, on the same database."""
        self.processes.start("superlink", self.site.superlink(), self.site.environment)
        port = self.site.superlink_port
        self.processes.wait_until(lambda: listens(port), "starting the SuperLink", START_S)

    def start_gate(self) -> None:
        """Start what the nodes reach from outside."""
        self.processes.start("gate", self.site.gate())
        port = self.site.port
        self.processes.wait_until(lambda: listens(port), "starting the gate", START_S)

    def node(self, client: int) -> NodeSite:
        """A node's folder; it calls the gate of this start."""
        site = read_node_site(self.folder / f"node-{client}")
        return NodeSite(site.folder, f"127.0.0.1:{self.site.port}", client)

    def start_node(self, client: int, settings: Mapping[str, Any], server: str = "") -> None:
        """Start a SuperNode; `server` is another address than the gate's."""
        site = self.node(client)
        if server:
            site = NodeSite(site.folder, server, client)
        self.processes.start(f"worker-{client}", site.worker())
        command = site.supernode(settings, free_port())
        self.processes.start(f"node-{client}", command, site.environment)

    def keep_up(self, say: Callable[[str], None]) -> None:
        """Start nodes again that have ended: one that crashed is refused for most of a minute.

        Raises:
            UserError: a process of the server has ended.
        """
        self.processes.check(SERVER_PROCESSES)
        words = self.processes.last_words
        self.processes.revive(NODE_PAUSE_S, lambda *end: say(words(*end)))

    def submit(self, settings: Mapping[str, str]) -> int:
        """Hand over a run; returns Flower's id of it."""
        return submit.start(self.site, settings, self.folder / "submitted", self.environment)

    def status(self, run_id: int) -> str:
        """Flower's word for a run's state."""
        return submit.status(run_id, self.environment)


def run_local(config: Config, display: Display, folder: Path | None = None) -> Path:
    """Run an experiment on a federation of real processes on this machine; its run folder.

    `folder` is for the federation's own files; None = beside the run folder, `<run>-nodes`.

    Raises:
        UserError: what is wrong, with the log that says more.
    """
    handed = submit.new_run(config)
    assert handed.output.dir is not None
    path = Path(handed.output.dir)
    folder = folder or path.with_name(f"{path.name}-nodes")
    if config.data.source == "client_folders" and not config.data.folders:
        raise UserError("data.folders must name every client's folder; all nodes are here.")
    nodes = {"folders": [str(Path(f).expanduser().resolve()) for f in config.data.folders]}
    settings = submit.settings_of(handed)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "local.json", json.dumps(nodes, indent=2).encode())
    return _run(path, handed, settings, nodes["folders"], folder, display)


def resume_local(path: Path, display: Display, folder: Path | None = None) -> Path:
    """Go on with a run that `run_local` began.

    Raises:
        UserError: it did not, or its nodes' folders are gone.
    """
    from fedprompt.experiment.compose import parse

    path = path.resolve()
    settings = submit.settings_to_resume(path)
    folder = folder or path.with_name(f"{path.name}-nodes")
    try:
        folders = list(json.loads((folder / "local.json").read_text())["folders"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} is gone or damaged: the nodes of {path} lay there.") from None
    return _run(path, parse(settings["config"]), settings, folders, folder, display)


def _run(
    path: Path,
    config: Config,
    settings: Mapping[str, str],
    folders: list[str],
    folder: Path,
    display: Display,
) -> Path:
    clients, weights = config.partition.clients, config.backbone.checkpoint
    display.phase(f"starting a server and {clients} nodes")
    with LocalFederation(folder, clients) as federation:
        federation.start_server()
        for client in range(clients):
            own = {"data": folders[client], "checkpoint": weights} if folders else {}
            federation.start_node(client, own)
        run_id = federation.submit(settings)
        display.phase(f"run {run_id}; logs in {federation.processes.logs}")
        submit.follow(
            path,
            display,
            status=lambda: federation.status(run_id),
            check=lambda: federation.keep_up(display.message),
        )
    again = f"fedprompt deploy local --resume {path}"
    return submit.conclude(path, display, again, folder / "logs")
