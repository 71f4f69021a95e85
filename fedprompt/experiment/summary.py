"""The end of a run: prompts, summary, tracker entries and report; runs on the server."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from fedprompt.data.partition import dense
from fedprompt.errors import UserError
from fedprompt.evaluation.registry import figures, result_tables
from fedprompt.experiment.client_backbones import accuracy_by_backbone
from fedprompt.experiment.display import Display
from fedprompt.experiment.logs import remove_tested
from fedprompt.experiment.run_folder import RunFolder
from fedprompt.experiment.selection import last_round, objective, select
from fedprompt.experiment.trackers import Loggers
from fedprompt.federation.client_tests import CLIENTS_AT_ONCE
from fedprompt.federation.presence import LATE
from fedprompt.federation.scores import personal_part
from fedprompt.federation.server_app import Federation
from fedprompt.methods.base import uploaded_numbers
from fedprompt.methods.registry import method_class
from fedprompt.reports.marks import marks
from fedprompt.reports.run_data import (
    FEW_TEST_IMAGES,
    METRICS,
    PROMPTS,
    SUMMARY,
    TIMINGS,
    context_tokens,
    load_run,
)
from fedprompt.reports.run_report import write_report
from fedprompt.runtime import versions
from fedprompt.runtime.cards import device_facts
from fedprompt.runtime.machine import cpu_count
from fedprompt.scoring import score_global, score_personal
from fedprompt.workspace import Workspace

log = logging.getLogger("fedprompt.run")


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
    """Finish a run after its last round: measure, then write prompts, summary and report.

    Args:
        federation: the server's side, with the final shared tensors.
        folder: the run folder.
        display: shows the progress and the result.
        line: the last round's line of `metrics.jsonl`.
        totals: bytes and rejected replies since the run began.
        started: the time at which the run was started or resumed, on the monotonic clock.
        loggers: the experiment trackers.
        local_only: the reported accuracies of the local-only baseline, or None.

    Raises:
        UserError: a client's measurements are missing, or a file cannot be written.
    """
    config, workspace, method = federation.config, federation.workspace, federation.method
    rounds = config.federation.rounds if method.trainable else 0
    tensors = {f"shared/{n}": t for n, t in federation.shared.items()}
    folder.write(PROMPTS, save(tensors, metadata={"method": config.method.name}))
    recorded = [x for x in folder.lines(METRICS) if x["kind"] == "round"]
    summary = {
        "experiment": config.experiment,
        "method": config.method.name,
        "context_tokens": context_tokens(asdict(config.method)),
        "strategy": config.strategy.name,
        "seed": config.seed,
        "rounds": rounds,
        "clients": config.partition.clients,
        "classes": len(workspace.task.class_names),
        "backbone": config.backbone.model,
        "data": config.data.title,
        **last_round([line]),
        "zero_shot": _zero_shot(workspace) | federation.zero_shot_elsewhere(),
        "local_only": local_only,
        "shared": {n: list(shape) for n, shape in workspace.shared_shapes.items()},
        "private": {n: list(t.shape) for n, t in method.init_private(config.seed, 0).items()},
        "uploaded_numbers_per_client_round": uploaded_numbers(method),
        "bytes_up": totals["bytes_up"],
        "bytes_down": totals["bytes_down"],
        "client_steps": client_steps(recorded),
        **simulated_seconds(recorded),
        "rejected_replies": totals["rejected"],
        "skipped_images": len(workspace.dataset.bad_images),
    }
    if workspace.task.multi_label is not None:
        summary["score"] = "mAP"
    summary["few_test_images"] = few_test_images(federation.describe())
    if unlabelled := sorted(workspace.partition.unlabelled):
        train = config.trains_without_labels
        summary["unlabelled_clients"] = {"clients": unlabelled, "train": train}
    if workspace.late:
        summary["late_clients"] = sorted(workspace.late)
    if recorded and (spent := recorded[-1].get("privacy")):
        summary["privacy"] = spent
    summary |= absent_updates(recorded)
    if by_backbone := accuracy_by_backbone(federation, line):
        summary["by_backbone"] = by_backbone
    if marked := marks(recorded, federation.asked):
        summary["marks"] = marked
    if line["round"] < rounds:
        summary["ended_after_round"] = line["round"]
    value = objective(recorded, config.evaluation)
    if value is not None:
        summary["objective"] = {"name": config.evaluation.objective, "value": value}
    if config.evaluation.select == "best_validation":
        summary |= {"last": last_round(recorded), **select(recorded)}
    # After everything else is known: protocols such as `fairness` read the summary.
    if parts := federation.measure_protocols(recorded, summary):
        summary["protocols"] = parts
    summary |= measured_costs(folder.lines(TIMINGS))
    summary["wall_s"] = round(time.monotonic() - started, 3)
    summary["environment"] = environment(workspace)
    # A run folder with a summary is a complete run, so this comes after all measurements. What
    # follows can be repeated: resuming a finished run draws a missing report.
    folder.complete(summary)
    remove_tested(folder.path)
    loggers.finish(summary, folder.lines(METRICS))
    # The table first: it needs no disk, and the report is only another view of the files.
    show_result(display, summary, folder.path)
    if config.output.report:
        try:
            draw_report(folder.path)
        except UserError as error:
            # The run is complete, whatever happens to its report.
            log.warning("%s", error)


def client_steps(rounds: Sequence[Mapping[str, Any]]) -> int | None:
    """Optimiser steps of all clients over all rounds; None if an older version began the run.

    Args:
        rounds: the lines of rounds in `metrics.jsonl`.
    """
    if not all("client_steps" in line for line in rounds):
        return None
    steps: list[int] = [line["client_steps"] for line in rounds]
    return sum(steps)


def absent_updates(rounds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """The updates that a simulation has left out, as `absent_updates`; nothing if there are none.

    Args:
        rounds: the lines of rounds in `metrics.jsonl`.

    Returns:
        The number of updates that were `asked` for, that have not come because their clients
        `dropped_out`, and that have come `late`.
    """
    reasons = [why for line in rounds for why in line.get("absent", {}).values()]
    if not reasons:
        return {}
    late = sum(why.startswith(LATE) for why in reasons)
    asked = sum(line["clients"]["sampled"] for line in rounds if line.get("clients"))
    counts = {"asked": asked, "dropped_out": len(reasons) - late, "late": late}
    return {"absent_updates": counts}


def simulated_seconds(rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The `simulated_seconds` of a run with a simulated clock; nothing for other runs.

    Args:
        rounds: the lines of rounds in `metrics.jsonl`.
    """
    clocks = [line["clock"]["seconds"] for line in rounds if "clock" in line]
    return {"simulated_seconds": sum(clocks)} if clocks else {}


def seconds_of(timings: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of all rounds, training and evaluation together, of the lines of `timings.jsonl`."""
    seconds: float = sum(line["train_s"] + line["evaluate_s"] for line in timings)
    return seconds


def measured_costs(timings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds and memory of a run, over all parts of it if it was interrupted.

    Args:
        timings: the lines of `timings.jsonl`.

    Returns:
        The `seconds` of all rounds, training and evaluation together, without opening the data and
        without the local-only baseline; and the `peak_memory_bytes` of the server's process, None
        where the system does not tell.
    """
    peaks = [peak for line in timings if (peak := line.get("peak_memory_bytes")) is not None]
    return {"seconds": round(seconds_of(timings), 3), "peak_memory_bytes": max(peaks, default=None)}


def few_test_images(description: Mapping[str, Any]) -> dict[str, Any]:
    """The clients whose accuracy rests on so few images that it says little.

    Args:
        description: the content of `partition.json`.

    Returns:
        The clients' ids as `clients`, and the number of images that they are `below`. Clients
        without test images are not tested at all and not listed.
    """
    counts = description.get("test_counts") or []
    images = dense(counts, len(description["class_names"])).sum(axis=1).tolist()
    few = [client for client, number in enumerate(images) if 0 < number < FEW_TEST_IMAGES]
    return {"below": FEW_TEST_IMAGES, "clients": few}


def show_result(display: Display, summary: Mapping[str, Any], path: Path) -> None:
    """Show the result of a complete run, with the tables of its protocols.

    Args:
        display: where it is shown.
        summary: the contents of `summary.json`.
        path: the run folder.

    Raises:
        UserError: the protocols' results in the summary are damaged.
    """
    display.finish(summary, path, result_tables(summary, str(path / SUMMARY)))


def _zero_shot(workspace: Workspace) -> dict[str, Any]:
    """Zero-shot accuracy on the server's test images and on every client's own.

    Computed in the server's process, on the images that this process holds.
    """
    zero = workspace
    if workspace.method.name != "zero_shot":
        zero = workspace.with_method(method_class("zero_shot").Config())
    score = score_global(zero.method, {}, *zero.server_test())
    assert score is not None
    clients, accuracy = [], []
    # The test images of all clients together may not fit in memory.
    for first in range(0, zero.num_clients, CLIENTS_AT_ONCE):
        some = range(first, min(first + CLIENTS_AT_ONCE, zero.num_clients))
        own, _ = score_personal(zero.method, [{}], [{}], [zero.test_data(c) for c in some])
        tested = [(c, s.accuracy) for c, s in zip(some, own, strict=True) if s.accuracy is not None]
        clients += [c for c, _ in tested]
        accuracy += [a for _, a in tested]
    return {"accuracy": score.accuracy, "personal": personal_part(clients, accuracy)}


def environment(workspace: Workspace | None = None) -> dict[str, Any]:
    """Versions, device (with a GPU's name and driver) and threads: last bits depend on them.

    Args:
        workspace: supplies the device; None if no backbone is open.
    """
    return {
        **versions(),
        **(device_facts(workspace.clip.device) if workspace else {"device": None}),
        "cpus": cpu_count(),
        "threads": torch.get_num_threads(),
    }


def draw_report(path: Path) -> Path:
    """Draw the figures of a run, finished or not, and write its report.

    Args:
        path: the run folder.

    Returns:
        The path of the report.

    Raises:
        UserError: the run folder lacks a file, or a file is damaged.
    """
    run = load_run(path, history=False)
    tables = result_tables(run.summary or {}, str(path / SUMMARY))
    return write_report(run, tables, figures(run))
