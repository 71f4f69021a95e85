"""One simulated experiment from config to report, on this machine or a Ray cluster.

`fedprompt run`, `fedprompt.run` and every run of a sweep end up here. Federations of real machines
are run by `fedprompt.deploy`, with the same loop over rounds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedprompt.backbone.devices import ordered_sums
from fedprompt.config.conditions import AsynchronousConfig, ClockConfig
from fedprompt.config.protection import SecureAggregationConfig
from fedprompt.config.schema import Config
from fedprompt.data.sources.client_folders import ClientFoldersConfig
from fedprompt.errors import StopRun, UserError
from fedprompt.experiment.display import Display
from fedprompt.experiment.paths import absolute
from fedprompt.experiment.resuming import changed, schedule_note
from fedprompt.experiment.rounds import NoBaseline, run_reference, run_server, train_reference
from fedprompt.experiment.run_folder import RunFolder
from fedprompt.experiment.summary import draw_report, finish, show_result
from fedprompt.experiment.trackers import Loggers, check_installed
from fedprompt.experiment.validate import unsuited_backbone
from fedprompt.experiment.workspaces import ResourceCache, open_workspace, opener_for
from fedprompt.federation.asynchronous import open_federation
from fedprompt.federation.clock import Clock
from fedprompt.federation.server_app import Federation
from fedprompt.federation.trace import Trace
from fedprompt.messages import Traffic
from fedprompt.methods.registry import method_class
from fedprompt.reports.page import is_whole
from fedprompt.reports.run_data import (
    METRICS,
    PRIVATE,
    REPORT,
    SUMMARY,
    context_tokens,
    load_run,
)
from fedprompt.runtime.device_memory import DEVICE_ERRORS, device_fault
from fedprompt.runtime.endings import advice, command_line
from fedprompt.runtime.peak_memory import reset_peak_memory
from fedprompt.simulation.block_grid import BlockGrid
from fedprompt.simulation.grids import check_grid, open_grid
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.simulation.private_log import PrivateLog
from fedprompt.workspace import Workspace


def run(config: Config, display: Display, resources: ResourceCache | None = None) -> Path:
    """Run an experiment from its config to its report.

    Args:
        config: the experiment.
        display: shows the progress.
        resources: keeps backbone and data sets open for later runs of this process.

    Returns:
        The path of the run folder. The run is unfinished if the display stopped it (`StopRun`).

    Raises:
        UserError: data or weights cannot be read, Ray does not start, or a file cannot be written.
            A folder without a finished round is removed again.
    """
    # Absolute, so that the run folder's config repeats the run from wherever it is started.
    config = absolute(config)
    # Checked before the folder is created: packages of the trackers may not be installed.
    check_installed(config.output.loggers)
    return _run_in(RunFolder.create(config), config, display, resources)


def resume(
    path: Path,
    display: Display,
    resources: ResourceCache | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Continue an interrupted run from its last checkpoint.

    The results are the same, bit for bit, as without the interruption. A finished run is not
    changed, except that a missing or torn report is drawn, unless it is given more rounds.

    Args:
        path: the run folder.
        display: shows the progress.
        resources: keeps backbone and data sets open for later runs of this process.
        overrides: changes as on the command line, of the keys in `resuming.CHANGEABLE`. More
            rounds also continue a finished run.

    Returns:
        The path of the run folder.

    Raises:
        UserError: an override is of another key, the folder holds no run, is damaged or in use, or
            `run` would raise it.
    """
    folder, config = RunFolder.resume(path)
    try:
        config = _reopened(folder, config, overrides, display)
        if (path / SUMMARY).is_file():
            show_result(display, load_run(path, history=False).summary or {}, path)
            if config.output.report and not is_whole(path / REPORT):
                draw_report(path)
            folder.close()
            return path
    except BaseException:
        folder.close()
        raise
    return _run_in(folder, config, display, resources)


def _run_in(
    folder: RunFolder, config: Config, display: Display, resources: ResourceCache | None
) -> Path:
    command = command_line("run", "--resume", str(folder.path))
    with advice(lambda: f"continue with: {command}"):
        return _run(config, folder, display, resources)


def _reopened(
    folder: RunFolder, config: Config, overrides: Sequence[str], display: Display
) -> Config:
    """Apply the changes that are given beside `--resume`, and say what they do."""
    wanted = changed(config, overrides)
    if wanted == config:
        return config
    if wanted.federation.rounds != config.federation.rounds:
        checkpoint = folder.load_checkpoint()
        done = checkpoint.server_round if checkpoint else 0
        if wanted.federation.rounds < done:
            raise UserError(
                f"federation.rounds={wanted.federation.rounds}: the run in {folder.path} has "
                f"already done {done} rounds."
            )
        display.message(schedule_note(config, wanted, done))
        folder.reopen(wanted)
    elif not (folder.path / SUMMARY).is_file():
        folder.reopen(wanted)
    return wanted


def _run(
    config: Config, folder: RunFolder, display: Display, resources: ResourceCache | None
) -> Path:
    started = time.monotonic()
    # The process may have run others before, as in a sweep.
    reset_peak_memory()
    grid: BlockGrid | None = None
    private = PrivateLog(folder.path / PRIVATE, config.partition.clients)
    loggers, settings = Loggers(config, folder.path), ExitStack()
    try:
        # Cheap checks first; opening data and backbone may take minutes.
        _refuse_absent_folders(config)
        _refuse_other_conditions(config)
        check_grid(config)
        settings.enter_context(ordered_sums(config.backbone))
        loggers.open(resumed=folder.resumed)
        checkpoint = folder.load_checkpoint()
        if warning := unsuited_backbone(config):
            display.message(warning)
        display.phase("opening data and backbone")
        resources = resources or ResourceCache()
        workspace = open_workspace(config, progress=True, resources=resources)
        for note in workspace.dataset.notes:
            display.message(note)
        for bad in workspace.dataset.bad_images:
            display.message(f"skipped {bad.where}: {bad.reason}")
        grid = open_grid(config, workspace, opener_for(config, resources), private)
        grid.check_memory()
        federation = open_federation(workspace, grid)
        line, totals = run_server(federation, folder, display, checkpoint, private, loggers.line)
        _train_references(federation, grid, display)
        local_only, fault = None, None
        # The baseline is tested on the clients' own images, and is `coop_local` itself.
        baseline = config.evaluation.local_only and "personalised" in config.protocols
        if baseline and config.method.name != "coop_local":
            try:
                local_only = _local_only(workspace, grid, folder, display, loggers)
            except NoBaseline as error:
                fault = error
        finish(federation, folder, display, line, totals, started, loggers, local_only=local_only)
        if fault is not None:
            raise fault
    except StopRun:
        display.message(f"stopped; 'fedprompt run --resume {folder.path}' continues the run")
    except UserError:
        loggers.close()
        folder.discard_unstarted()
        raise
    except DEVICE_ERRORS as error:
        # Raised where the server evaluates; grids raise a `DeviceFault` themselves.
        raise device_fault(error) from None
    finally:
        if grid is not None:
            grid.close()
        private.close()
        settings.close()
        loggers.close()
        folder.close()
    return folder.path


def _refuse_absent_folders(config: Config) -> None:
    """Refuse a simulation without the images of all clients.

    On real nodes, each node has the folder of its own client, and the config names none.
    """
    if not isinstance(config.data, ClientFoldersConfig):
        return
    if not (config.data.folders and all(config.data.folders)):
        raise UserError(
            "data.folders must name the folder of every client for a run on this machine; on nodes "
            "with folders of their own, use 'fedprompt deploy run'."
        )


def _refuse_other_conditions(config: Config) -> None:
    """Refuse files of conditions and devices that cannot be read or do not fit the clients."""
    Trace(config.conditions, config.seed, config.partition.clients)
    Clock(config.clock, config.seed, config.partition.clients, Traffic())


def _train_references(federation: Federation, grid: BlockGrid, display: Display) -> None:
    """Train the federations that protocols compare the run with, in this process.

    Ray's workers hold the partition of the run; these federations have others.
    """
    for protocol in federation.protocols.each:
        if not protocol.retrains:
            continue
        trained = federation.protocols.references.setdefault(protocol.name, {})
        for name, workspace in protocol.references(federation.workspace):
            display.phase(f"{protocol.name}: {name}")
            # The sum is the same without masks, and there may be too few clients for them.
            workspace.config = replace(
                workspace.config, secure_aggregation=SecureAggregationConfig()
            )
            reference = open_federation(workspace, InlineGrid(workspace, answer=grid.answer))
            trained[name] = train_reference(reference)


def _local_only(
    workspace: Workspace,
    grid: BlockGrid,
    folder: RunFolder,
    display: Display,
    loggers: Loggers,
) -> dict[str, Any] | None:
    """Run the local-only baseline: every client trains alone, for as many rounds as the method.

    It uses the same grid, and therefore the same processes, after the method under test is done.

    Returns:
        The reported accuracies, or None if no client has labels.

    Raises:
        NoBaseline: no client has trained in any round.
    """
    display.phase("local-only baseline")
    reference = method_class("coop_local")
    # Prompts of unequal length would make the comparison one of lengths. Methods without text
    # prompts are compared with the shortest usual prompt, that of four tokens.
    tokens = workspace.config.evaluation.local_only_tokens or _tokens(workspace) or 4
    settings = workspace.config
    training = replace(
        settings.training, lr=settings.evaluation.local_only_lr or settings.training.lr
    )
    alone = workspace.with_method(reference.Config(context_tokens=tokens), training)
    # Nothing is uploaded that would have to be hidden or could come too late.
    alone.config = replace(
        alone.config,
        secure_aggregation=SecureAggregationConfig(),
        clock=ClockConfig(),
        asynchronous=AsynchronousConfig(),
        privacy=replace(alone.config.privacy, image_noise=0.0),
    )
    if not alone.trainable:
        display.message("no client has labels, so there is no local-only baseline")
        return None
    grid.use(alone)

    def record(line: dict[str, Any]) -> None:
        whole = {"kind": "local_only", **line}
        folder.append(METRICS, whole)
        loggers.line(whole)

    last = run_reference(Federation(alone, grid), record)
    return {**last, "context_tokens": tokens}


def _tokens(workspace: Workspace) -> int | None:
    return context_tokens(asdict(workspace.config.method))
