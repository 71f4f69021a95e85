"""A complete federation of real processes on this machine, with TLS and node keys (`deploy local`).

Runs on a terminal. All processes are children of this one, use the loopback interface only, and end
with it, however it ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedprompt.config.schema import LOCAL_FOLDER, Config
from fedprompt.data.sources.client_folders import ClientFoldersConfig
from fedprompt.deploy import submit
from fedprompt.deploy.connection import was_rejected
from fedprompt.deploy.credentials import CERTIFICATE
from fedprompt.deploy.expiry import expires_soon
from fedprompt.deploy.folders import SETTINGS, NodeFolder, ServerFolder, read_node_folder
from fedprompt.deploy.new_federation import create_federation, renew_federation
from fedprompt.deploy.ownership import in_use
from fedprompt.deploy.processes import Processes, free_port
from fedprompt.deploy.supervise import (
    NODE_PAUSE_S,
    SERVER_PROCESSES,
    start_server,
    start_superlink,
)
from fedprompt.errors import UserError
from fedprompt.experiment.compose import parse
from fedprompt.experiment.display import Display
from fedprompt.files import write_bytes
from fedprompt.runtime.endings import advice, command_line

START_S = 120.0
"""Seconds that a process of the server may take until it listens."""
DAYS = 30
"""How long the server's certificate is valid; a resumed run renews it in its last days."""
LOCAL = "local.json"
"""File with the clients' image folders, for a resumed run."""


class LocalFederation:
    """One server and N nodes; leaving the context ends all of their processes.

    Args:
        folder: for certificates, keys, logs and the nodes' folders; a resumed run uses them again.
        nodes: number of nodes.
        environment: variables of all processes, beyond this process's own.

    Raises:
        UserError: another process runs a federation in this folder.
    """

    def __init__(
        self, folder: Path, nodes: int, environment: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder.resolve()
        self.nodes = nodes
        self.processes = Processes(self.folder, environment)
        if not (self.folder / "server" / SETTINGS).is_file():
            create_federation(self.folder, ["127.0.0.1"], nodes, free_port(), DAYS)
        elif expires_soon(self.folder / "server" / CERTIFICATE):
            # All machines of this federation are this one, so nothing has to be copied.
            renew_federation(self.folder, DAYS)
        # The ports of an earlier start may be in use by now, so the stored ones are not used.
        self.server = ServerFolder(self.folder / "server", free_port(), free_port())
        self.server.prepare()
        self.environment = {**self.processes.environment, **self.server.environment}

    def __enter__(self) -> LocalFederation:
        return self

    def __exit__(self, *_: object) -> None:
        self.processes.stop()

    def start_server(self) -> None:
        """Start the server's processes and register the nodes' keys.

        Raises:
            UserError: one of the processes does not start.
        """
        start_server(self.processes, self.server, "127.0.0.1", START_S)

    def start_superlink(self) -> None:
        """Start the SuperLink alone, after it has ended; it continues with its database."""
        start_superlink(self.processes, self.server, START_S)

    def node(self, client: int) -> NodeFolder:
        """A node's folder, with the address of the fleet proxy of this start."""
        node = read_node_folder(self.folder / f"node-{client}")
        return NodeFolder(node.path, f"127.0.0.1:{self.server.port}", client)

    def start_node(self, client: int, settings: Mapping[str, Any], server: str = "") -> None:
        """Start a node's worker and its SuperNode.

        Args:
            client: the number of the client that the node is.
            settings: the node's own settings, see node_config.py.
            server: another address, `host:port`, than the fleet proxy's.
        """
        node = self.node(client)
        if server:
            node = replace(node, server=server)
        self.processes.start(f"worker-{client}", node.worker_command())
        command = node.supernode_command(settings, free_port())
        self.processes.start(f"node-{client}", command, node.environment)

    def keep_running(self, report: Callable[[str], None]) -> None:
        """Restart nodes that have exited; to be called in a loop.

        Args:
            report: is called with one line about every node process that has exited.

        Raises:
            UserError: a process of the server has exited.
        """
        # Unlike `deploy server`, this command does not restart the server's processes.
        self.processes.check(SERVER_PROCESSES)

        def exited(name: str, status: int) -> bool:
            report(self.processes.exit_line(name, status))
            return was_rejected(self.processes.log(name))

        self.processes.restart_exited(NODE_PAUSE_S, exited)

    def submit(self, settings: Mapping[str, str], *, same_machine: bool = False) -> int:
        """Submit a run; returns Flower's id of it.

        Args:
            settings: the run's settings, from `settings_of` or `settings_to_resume`.
            same_machine: whether the nodes were started to open the paths of the experiment.
        """
        return submit.start_run(
            self.server, settings, self.folder / "submitted", self.environment,
            same_machine=same_machine,
        )  # fmt: skip

    def status(self, run_id: int) -> str:
        """Flower's word for a run's state."""
        return submit.run_status(run_id, self.environment)


def run_local(config: Config, display: Display, folder: Path | None = None) -> Path:
    """Run an experiment on a federation of real processes on this machine.

    Args:
        config: the experiment; with `data.source=client_folders` it names every client's folder.
        display: where the run's lines and its result are shown.
        folder: for the federation's own files; None uses `<run folder>-nodes`.

    Returns:
        The run folder.

    Raises:
        UserError: a client's folder is not named, a process does not start, or the run has failed.
    """
    submitted = submit.new_run(config)
    assert submitted.output.dir is not None
    path = Path(submitted.output.dir)
    folder = folder or path.with_name(f"{path.name}-nodes")
    client_folders = config.data.folders if isinstance(config.data, ClientFoldersConfig) else None
    if client_folders == []:
        raise UserError(
            "data.folders must name the folder of every client, because all nodes run on this "
            "machine."
        )
    image_folders = [str(Path(f).expanduser().resolve()) for f in client_folders or ()]
    if folder.is_dir() and any(folder.iterdir()) and not (folder / LOCAL).is_file():
        raise UserError(
            f"{folder} is not empty and holds no nodes of an earlier 'deploy local'; choose "
            "another folder with --folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    # The submitted experiment names no client's folder, so a resumed run reads them here.
    write_bytes(folder / LOCAL, json.dumps({"folders": image_folders}, indent=2).encode())
    return _run(path, submitted, submit.settings_of(submitted), image_folders, folder, display)


def resume_local(path: Path, display: Display, folder: Path | None = None) -> Path:
    """Resume a run that `run_local` has started.

    Args:
        path: the run folder.
        display: where the run's lines and its result are shown.
        folder: the folder with the federation's own files; None uses `<run folder>-nodes`.

    Returns:
        The run folder.

    Raises:
        UserError: `path` contains no such run, or the run is in progress, or the nodes' folders no
            longer exist.
    """
    path = path.resolve()
    settings = submit.settings_to_resume(path)
    folder = folder or path.with_name(f"{path.name}-nodes")
    if owner := in_use(folder):
        raise UserError(f"the run in {path} is in progress: {owner}.")
    try:
        image_folders = list(json.loads((folder / LOCAL).read_text())["folders"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder / LOCAL} is missing or damaged. The nodes of {path} had their folders in "
            f"{folder}; if that folder was moved, name it with --folder."
        ) from None
    return _run(path, parse(settings["config"]), settings, image_folders, folder, display)


def _run(
    path: Path,
    config: Config,
    settings: Mapping[str, str],
    image_folders: list[str],
    folder: Path,
    display: Display,
) -> Path:
    clients, backbone = config.partition.clients, config.backbone
    weights = backbone.checkpoint
    if backbone.model.startswith(LOCAL_FOLDER):
        weights = backbone.model.removeprefix(LOCAL_FOLDER)
    # The folder is named in any case, so that a path of the user's choice is not forgotten.
    resume = command_line("deploy", "local", "--resume", str(path), "--folder", str(folder))
    again = command_line()

    def how_to_go_on() -> str:
        # Written by the server app, which is the last process to start.
        begun = (path / submit.DEPLOYMENT).is_file()
        return f"continue with: {resume}" if begun else f"start it again with: {again}"

    display.phase(f"starting a server and {clients} nodes")
    with advice(how_to_go_on), LocalFederation(folder, clients) as federation:
        federation.start_server()
        for client in range(clients):
            # A node that lends an image folder opens no path of the experiment, not even its
            # weights. The other nodes open the same paths as the server.
            own: dict[str, Any] = {"same-machine": True}
            if image_folders:
                own = {"data": image_folders[client], "checkpoint": weights}
            federation.start_node(client, own)
        run_id = federation.submit(settings, same_machine=not image_folders)
        display.phase(f"run {run_id}; logs are in {federation.processes.logs}")
        submit.follow(
            path,
            display,
            status=lambda: federation.status(run_id),
            check=lambda: federation.keep_running(display.message),
        )
    return submit.conclude(path, display, resume, folder / "logs")
