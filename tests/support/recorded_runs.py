"""Runs in this process that write a run folder, to the end or not, and go on from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedprompt.experiment.checkpoint import read_checkpoint
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.rounds import run_server
from fedprompt.experiment.run_folder import RunFolder
from fedprompt.federation.checkpoint import Checkpoint
from fedprompt.federation.server_app import Federation
from fedprompt.reports.run_data import CHECKPOINT, PRIVATE
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.simulation.private_log import PrivateLog
from fedprompt.workspace import Workspace


def play(workspace: Workspace, path: Path, display: QuietDisplay | None = None) -> Federation:
    """Run a workspace's experiment in a new folder; returns its federation at the end.

    Args:
        workspace: the experiment.
        path: the run folder.
        display: for example `StopAfter`, which interrupts the run.
    """
    output = replace(workspace.config.output, dir=str(path))
    folder = RunFolder.create(replace(workspace.config, output=output))
    return _played(workspace, folder, display or QuietDisplay(), None)


def play_on(workspace: Workspace, path: Path) -> Federation:
    """Resume the interrupted run in a folder; returns its federation at the end.

    Args:
        workspace: the experiment.
        path: the run folder.
    """
    checkpoint = read_checkpoint(path / CHECKPOINT)
    return _played(workspace, RunFolder.resume(path)[0], QuietDisplay(), checkpoint)


def _played(
    workspace: Workspace, folder: RunFolder, display: QuietDisplay, checkpoint: Checkpoint | None
) -> Federation:
    private = PrivateLog(folder.path / PRIVATE, workspace.num_clients)
    try:
        federation = Federation(workspace, InlineGrid(workspace, private))
        run_server(federation, folder, display, checkpoint, private)
    finally:
        private.close()
        folder.close()
    return federation
