"""Flower's ServerApp: the rounds of an experiment on the nodes that are connected.

Flower's SuperExec starts it on the server, in a process of its own for every run. It shares the
loop over rounds and everything after it with a simulation (`fedprompt.experiment`).
"""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedprompt.backbone.devices import order_sums
from fedprompt.config.schema import Config, to_yaml
from fedprompt.deploy.node_config import on_server
from fedprompt.deploy.node_federation import NodeFederation
from fedprompt.deploy.node_grid import NodeGrid
from fedprompt.deploy.submission import Submission, read_submission
from fedprompt.deploy.submit import DEPLOYMENT, LOG
from fedprompt.errors import UserError
from fedprompt.experiment.compose import compose, parse
from fedprompt.experiment.display import LogDisplay
from fedprompt.experiment.rounds import run_server
from fedprompt.experiment.run_folder import RunFolder
from fedprompt.experiment.summary import finish
from fedprompt.experiment.trackers import Loggers
from fedprompt.experiment.validate import unsuited_backbone
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.reports.run_data import SUMMARY
from fedprompt.runtime import use_threads
from fedprompt.runtime.peer_text import SafeFormatter, sanitised, stderr_formatter

log = logging.getLogger("fedprompt.server")
STYLE = "%(asctime)s %(levelname)s %(message)s"

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume the experiment that Flower's run config holds.

    Raises:
        UserError: something that the administrator has to fix. The message is one line in the logs,
            and Flower marks the run as failed.
    """
    _add_log_handler(logging.StreamHandler(sys.stderr), stderr_formatter(STYLE))
    try:
        # Whoever starts a run with `flwr run` may write numbers; all of our values are texts.
        settings = {k: str(v) for k, v in context.run_config.items()}
        # Only `deploy run` gives a run a name; a plain `flwr run` names an experiment instead.
        run = settings.get("run", "")
        submission = read_submission(run) if run else _without_submission(settings)
        folder, config = _open_run_folder(submission, context.run_id)
        try:
            # `deploy run` follows the run by reading this file.
            file = logging.FileHandler(folder.path / LOG, encoding="utf-8")
            _add_log_handler(file, SafeFormatter(STYLE))
            _run(folder, config, grid, submission.registered)
        finally:
            folder.close()
    except Exception as error:
        if not isinstance(error, UserError):
            log.exception("the server app has failed")
            # The last line of the log is what 'deploy run' says at the end.
            reason = sanitised(f"{type(error).__name__}: {error}")
            log.error("an unexpected error has ended the run (%s); the traceback is above", reason)
            raise
        log.error("%s", error)
        # Raised again, so that Flower marks the run as failed, but without its traceback.
        logging.getLogger("flwr").addFilter(_drop_traceback)
        raise


def _without_submission(settings: Mapping[str, str]) -> Submission:
    """The experiment that a plain `flwr run` names, with its overrides."""
    config = compose(settings["experiment"], shlex.split(settings["overrides"]))
    return Submission(to_yaml(config), run="", resume="", registered={})


def _open_run_folder(submission: Submission, run_id: int) -> tuple[RunFolder, Config]:
    """A new run folder, or that of the run to resume, and the experiment."""
    # The name of the nodes' private prompts, and Flower's id, by which the run can be followed.
    deployment = {"run": submission.run, "id": run_id}
    if submission.resume:
        folder, config = RunFolder.resume(Path(submission.resume))
        if not (folder.path / SUMMARY).is_file():
            folder.write_json(DEPLOYMENT, deployment)
        return folder, config
    config = parse(submission.config)
    folder = RunFolder.create(config)
    folder.write_json(DEPLOYMENT, deployment)
    return folder, config


def _run(folder: RunFolder, config: Config, grid: Grid, registered: Mapping[int, int]) -> None:
    if (folder.path / SUMMARY).is_file():
        log.info("the run in %s has already finished", folder.path)
        return
    started = time.monotonic()
    # The lines go to `server.log`, where `deploy run` reads them.
    display, loggers = LogDisplay(log.info), Loggers(config, folder.path)
    try:
        loggers.open(resumed=folder.resumed)
        checkpoint = folder.load_checkpoint()
        config = on_server(config)
        use_threads(config.simulation)
        order_sums(config.backbone)
        if warning := unsuited_backbone(config):
            display.message(warning)
        workspace = open_workspace(config)
        federation = NodeFederation(workspace, NodeGrid(grid), folder, registered)
        if checkpoint is not None:
            log.info("resuming after round %d", checkpoint.server_round)
        line, totals = run_server(federation, folder, display, checkpoint, log_line=loggers.line)
        log.info("a deployment has no local-only baseline")
        finish(federation, folder, display, line, totals, started, loggers, local_only=None)
    finally:
        loggers.close()
        display.close()


def _drop_traceback(record: logging.LogRecord) -> bool:
    """Keep Flower from printing a traceback for an error that is already explained in one line."""
    if record.exc_info and isinstance(record.exc_info[1], UserError):
        record.exc_info = None
    return True


def _add_log_handler(handler: logging.Handler, formatter: logging.Formatter) -> None:
    """Add a place for our log lines; Flower sends those on stderr to whoever follows the run."""
    handler.setFormatter(formatter)
    logger = logging.getLogger("fedprompt")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
