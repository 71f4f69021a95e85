"""The server's and a node's processes on a real machine: started together, started again, ended."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from fedprompt.config.schema import Config
from fedprompt.deploy import submit
from fedprompt.deploy.connection import Connection
from fedprompt.deploy.folders import SETTINGS, NodeSite, ServerSite
from fedprompt.deploy.processes import Processes, free_port, listens
from fedprompt.errors import UserError
from fedprompt.experiment.display import Display

START_S = 300.0
LOOK_S = 0.5
SERVER_PAUSE_S, NODE_PAUSE_S = 3.0, 10.0
"""Before a process is started again; Flower refuses a node that crashed for most of a minute."""


def serve(site: ServerSite, host: str) -> None:
    """Run the server until it is stopped: SuperLink and SuperExec on loopback, the gate on `host`.

    Raises:
        UserError: a port is taken, or a process does not come up.
    """
    site.prepare()
    _refuse_taken(site.port, "--port PORT, which the nodes then call too", host)
    _refuse_taken(site.superlink_port, f"superlink_port in {site.folder / SETTINGS}")
    with Processes(site.folder / "logs") as processes:
        _stop_on_signals()
        environment = {**processes.environment, **site.environment}
        processes.start("superlink", site.superlink(), site.environment)
        processes.wait_until(
            lambda: listens(site.superlink_port), "starting the SuperLink", START_S
        )
        nodes = submit.register(site, environment)
        processes.start("superexec", site.superexec(), site.environment)
        processes.start("gate", site.gate(host))
        processes.wait_until(lambda: listens(site.port, host), "starting the gate", START_S)
        _print(f"ready for {len(nodes)} nodes on {host}:{site.port}")
        while True:
            processes.revive(SERVER_PAUSE_S, lambda *end: _print(processes.last_words(*end)))
            time.sleep(LOOK_S)


def run_node(site: NodeSite, settings: Mapping[str, Any], port: int | None) -> None:
    """Run a node until it is stopped: its SuperNode, and the process that holds CLIP.

    `port` is for the node's own tasks, on loopback; None = any free one.

    Raises:
        UserError: the port is taken.
    """
    if port is not None:
        _refuse_taken(port, "another --port, or none")
    own_port = port or free_port()
    with Processes(site.folder / "logs") as processes:
        _stop_on_signals()
        connection = Connection(processes.log("supernode"), site.server, _print)

        def ended(name: str, status: int) -> None:
            if name == "supernode":
                connection.ended(name, status)
            else:
                _print(processes.last_words(name, status))

        processes.start("worker", site.worker())
        processes.start("supernode", site.supernode(settings, own_port), site.environment)
        _print(f"client {site.client} calls {site.server}; logs in {processes.logs}")
        while True:
            processes.revive(NODE_PAUSE_S, ended)
            connection.look()
            time.sleep(LOOK_S)


def run_here(site: ServerSite, config: Config, display: Display) -> Path:
    """Hand an experiment to the server that runs on this machine and follow it; its run folder."""
    if config.data.folders:
        raise UserError("data.folders is for one machine; leave it empty: nodes name their own.")
    handed = submit.new_run(config)
    assert handed.output.dir is not None
    return _hand_over(site, submit.settings_of(handed), Path(handed.output.dir), display)


def resume_here(site: ServerSite, path: Path, display: Display) -> Path:
    """Go on with a run of the server that runs on this machine."""
    return _hand_over(site, submit.settings_to_resume(path), path.resolve(), display)


def _hand_over(site: ServerSite, settings: Mapping[str, str], path: Path, display: Display) -> Path:
    environment = {**Processes(site.folder / "logs").environment, **site.environment}
    run_id = submit.start(site, settings, site.folder / "submitted", environment)
    display.phase(f"run {run_id} in {path}")
    submit.follow(
        path,
        display,
        status=lambda: submit.status(run_id, environment),
        check=lambda: None,  # a SuperLink that is away comes back, and the run goes on
    )
    again = f"fedprompt deploy run {site.folder} --resume {path}"
    return submit.conclude(path, display, again, site.folder / "logs")


def _refuse_taken(port: int, instead: str, host: str = "127.0.0.1") -> None:
    if listens(port, host):
        raise UserError(
            f"port {port} of this machine is taken by another program; stop it or set {instead}."
        )


def _print(line: str) -> None:
    print(line, flush=True)


def _stop_on_signals() -> None:
    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
