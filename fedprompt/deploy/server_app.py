"""Flower's ServerApp: the rounds of an experiment on the nodes that Flower connects."""

from __future__ import annotations

import logging
import shlex
import sys
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedprompt.config.schema import Config
from fedprompt.deploy.node_config import on_server
from fedprompt.deploy.node_federation import NodeFederation
from fedprompt.deploy.node_grid import NodeGrid
from fedprompt.deploy.submit import DEPLOYMENT, LOG
from fedprompt.errors import UserError
from fedprompt.experiment.compose import compose, parse
from fedprompt.experiment.display import make_display
from fedprompt.experiment.rounds import run_server
from fedprompt.experiment.run_folder import RunFolder
from fedprompt.experiment.summary import finish
from fedprompt.experiment.trackers import Loggers
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.reports.run_data import SUMMARY
from fedprompt.runtime import use_threads

log = logging.getLogger("fedprompt.server")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume the experiment.

    Raises:
        UserError: what the operator must mend; one line in the logs, and Flower's run has failed.
    """
    _log_to(logging.StreamHandler(sys.stderr))
    try:
        settings = {k: str(v) for k, v in context.run_config.items()}
        folder, config = _open(settings)
        try:
            _log_to(logging.FileHandler(folder.path / LOG, encoding="utf-8"))
            _run(folder, config, grid, _keyed(settings.get("nodes", "")))
        finally:
            folder.close()
    except UserError as error:
        log.error("%s", error)
        logging.getLogger("flwr").addFilter(_without_our_tracebacks)
        raise


def _open(settings: dict[str, str]) -> tuple[RunFolder, Config]:
    """A new run folder, or the one to go on with."""
    if settings.get("resume"):
        return RunFolder.resume(Path(settings["resume"]))
    text = settings.get("config")
    config = (
        parse(text) if text else compose(settings["experiment"], shlex.split(settings["overrides"]))
    )
    folder = RunFolder.create(config)
    folder.write_json(DEPLOYMENT, {"run": settings.get("run", "")})
    return folder, config


def _run(folder: RunFolder, config: Config, grid: Grid, keyed: dict[int, int]) -> None:
    if (folder.path / SUMMARY).is_file():
        log.info("%s is finished; nothing to do", folder.path)
        return
    started = time.monotonic()
    display, loggers = make_display(), Loggers(config, folder.path)
    try:
        loggers.open()
        checkpoint = folder.load_checkpoint()
        config = on_server(config)
        use_threads(config.simulation)
        workspace = open_workspace(config)
        federation = NodeFederation(workspace, NodeGrid(grid), folder, keyed)
        if checkpoint is not None:
            log.info("going on after round %d", checkpoint.server_round)
        line, totals = run_server(federation, folder, display, checkpoint, log_line=loggers.line)
        log.info("no local-only baseline: a deployment does not run one")
        finish(federation, folder, display, line, totals, started, loggers, local_only=None)
    finally:
        loggers.close()
        display.close()


def _keyed(text: str) -> dict[int, int]:
    """Client of every registered node id, from `id:client,id:client`."""
    pairs = (item.split(":") for item in text.split(",") if item)
    return {int(node): int(client) for node, client in pairs}


def _without_our_tracebacks(record: logging.LogRecord) -> bool:
    """Flower prints a traceback of whatever ends an app; ours is said in one line already."""
    if record.exc_info and isinstance(record.exc_info[1], UserError):
        record.exc_info = None
    return True


def _log_to(handler: logging.Handler) -> None:
    """Our own lines; Flower sends what is written to stderr to whoever follows the run."""
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("fedprompt")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
