"""One experiment from config to report, on this machine or a Ray cluster."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from fedprompt.display import Display
from fedprompt.errors import UserError
from fedprompt.evaluation import score_global, score_personal
from fedprompt.grid import CohortGrid, open_grid
from fedprompt.loggers import Loggers, check_installed
from fedprompt.methods import method_class
from fedprompt.opened import Opened
from fedprompt.private_log import PrivateLog
from fedprompt.run_folder import METRICS, PRIVATE, PROMPTS, REPORT, SUMMARY, RunFolder
from fedprompt.schema import Config, SecureAggregationConfig
from fedprompt.server_app import (
    CLIENTS_AT_ONCE,
    Federation,
    personal_part,
    run_reference,
    run_server,
)
from fedprompt.workspace import Workspace


def run(config: Config, display: Display, opened: Opened | None = None) -> Path:
    """A new run; returns its folder. `opened` keeps what later runs of this process share."""
    check_installed(config.output.loggers)
    return _run(config, RunFolder.create(config), display, opened)


def resume(path: Path, display: Display, opened: Opened | None = None) -> Path:
    """Go on with a run that was interrupted; a finished one is left as it is."""
    folder, config = RunFolder.resume(path)
    if (path / SUMMARY).is_file():
        if config.output.report and not (path / REPORT).is_file():
            draw_report(path)
        display.finish(json.loads((path / SUMMARY).read_text()), path)
        folder.close()
        return path
    return _run(config, folder, display, opened)


def _run(config: Config, folder: RunFolder, display: Display, opened: Opened | None) -> Path:
    started = time.monotonic()
    grid: CohortGrid | None = None
    loggers = Loggers(config, folder.path)
    try:
        _refuse_absent_folders(config)
        loggers.open()
        checkpoint = folder.load_checkpoint()
        display.phase("opening data and backbone")
        workspace = Workspace.open(config, opened=opened)
        for bad in workspace.dataset.bad_images:
            display.message(f"skipped {bad.where}: {bad.reason}")
        private = PrivateLog(folder.path / PRIVATE, config.partition.clients)
        grid = open_grid(config, workspace, private)
        federation = Federation(workspace, grid)
        line, totals = run_server(federation, folder, display, checkpoint, private, loggers.line)
        local_only = None
        wanted = config.evaluation.local_only and "personalised" in config.protocols
        if wanted and config.method.name != "coop_local":
            local_only = _local_only(workspace, grid, folder, display, loggers)
        finish(federation, folder, display, line, totals, started, loggers, local_only=local_only)
    except UserError:
        loggers.close()
        folder.discard_unstarted()
        raise
    finally:
        if grid is not None:
            grid.close()
        loggers.close()
        folder.close()
    return folder.path


def _refuse_absent_folders(config: Config) -> None:
    """A run on this machine needs all clients' images."""
    folders = config.data.folders
    if config.data.source == "client_folders" and not (folders and all(folders)):
        raise UserError(
            "data.folders must name the folder of every client for a run on this machine; on nodes "
            "with folders of their own, use 'fedprompt deploy run'."
        )


def _local_only(
    workspace: Workspace,
    grid: CohortGrid,
    folder: RunFolder,
    display: Display,
    loggers: Loggers,
) -> dict[str, Any] | None:
    """Every client alone, for as many rounds and with as many tokens as the method uses."""
    display.phase("local-only baseline")
    reference = method_class("coop_local")
    tokens = workspace.config.evaluation.local_only_tokens
    alone = workspace.with_method(reference.Config(context_tokens=tokens))
    alone.config = replace(alone.config, secure_aggregation=SecureAggregationConfig())
    grid.use(alone)

    def record(line: dict[str, Any]) -> None:
        whole = {"kind": "local_only", **line}
        folder.append(METRICS, whole)
        loggers.line(whole)

    return run_reference(Federation(alone, grid), record)


def finish(
    federation: Federation,
    folder: RunFolder,
    display: Display,
    line: dict[str, Any],
    totals: dict[str, int],
    started: float,
    loggers: Loggers,
    *,
    local_only: dict[str, Any] | None,
) -> None:
    """Write prompts, the summary that says the run is complete, then logs, plots and report."""
    config, workspace, method = federation.config, federation.workspace, federation.method
    rounds = config.federation.rounds if method.trainable else 0
    tensors = {f"shared/{n}": t for n, t in federation.shared.items()}
    folder.write(PROMPTS, save(tensors, metadata={"method": config.method.name}))
    summary = {
        "experiment": config.experiment,
        "method": config.method.name,
        "strategy": config.strategy.name,
        "seed": config.seed,
        "rounds": rounds,
        "clients": config.partition.clients,
        "classes": len(workspace.task.class_names),
        "backbone": config.backbone.model,
        "data": config.data.title,
        "global": line.get("global") or {"accuracy": None, "loss": None},
        "personal": line.get("personal"),
        "personal_on_global": line.get("personal_on_global"),
        "zero_shot": _zero_shot(workspace) | federation.zero_shot_elsewhere(),
        "local_only": local_only,
        "shared": {n: list(shape) for n, shape in workspace.shared_shapes.items()},
        "private": {n: list(t.shape) for n, t in method.init_private(config.seed, 0).items()},
        "uploaded_numbers_per_client_round": method.uploaded_numbers(),
        "bytes_up": totals["bytes_up"],
        "bytes_down": totals["bytes_down"],
        "rejected_replies": totals["rejected"],
        "skipped_images": len(workspace.dataset.bad_images),
    }
    recorded = [x for x in folder.lines(METRICS) if x["kind"] == "round"]
    if parts := federation.measure_protocols(recorded, summary):
        summary["protocols"] = parts
    summary["wall_s"] = round(time.monotonic() - started, 3)
    summary["environment"] = environment(workspace)
    folder.write_json(SUMMARY, summary)
    loggers.finish(summary, folder.lines(METRICS))
    if config.output.report:
        display.phase("drawing the report")
        draw_report(folder.path)
    display.finish(summary, folder.path)


def _zero_shot(workspace: Workspace) -> dict[str, Any]:
    """Zero-shot accuracy on the server's test set and on every client's own."""
    zero = workspace
    if workspace.method.name != "zero_shot":
        zero = workspace.with_method(method_class("zero_shot").Config())
    score = score_global(zero.method, {}, *zero.server_test())
    assert score is not None
    clients, accuracy = [], []
    for first in range(0, zero.num_clients, CLIENTS_AT_ONCE):
        some = range(first, min(first + CLIENTS_AT_ONCE, zero.num_clients))
        own, _ = score_personal(zero.method, [{}], [{}], [zero.test_data(c) for c in some])
        tested = [(c, s.accuracy) for c, s in zip(some, own, strict=True) if s.accuracy is not None]
        clients += [c for c, _ in tested]
        accuracy += [a for _, a in tested]
    return {"accuracy": score.accuracy, "personal": personal_part(clients, accuracy)}


def environment(workspace: Workspace | None = None) -> dict[str, Any]:
    """Versions and device, for the summary."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = {"torch": "torch", "open_clip": "open_clip_torch", "flwr": "flwr", "ray": "ray"}
    return {
        "fedprompt": installed("fedprompt"),
        "python": platform.python_version(),
        **{name: installed(package) for name, package in packages.items()},
        "device": str(workspace.clip.device) if workspace else None,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def draw_report(path: Path) -> Path:
    """Draw the plots of a run and write its report; works on unfinished runs too."""
    from fedprompt.report import write_report

    return write_report(path)
