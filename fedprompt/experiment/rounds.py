"""The loop over the rounds of a run; it runs on the server, in a simulation and in a deployment.

A round has seven steps; the first four are `Federation.train_round`:

1. Sample the clients that train.
2. Send them the shared tensors.
3. Check their replies.
4. Aggregate the valid ones.
5. Evaluate.
6. Record the round in `metrics.jsonl`.
7. Write a checkpoint.

Round 0 is the state before any training and begins with step 5.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedprompt.errors import RunFailed, UserError
from fedprompt.experiment.client_backbones import backbones_note
from fedprompt.experiment.display import Display
from fedprompt.experiment.logs import (
    Logs,
    ProgressOfTest,
    StrategyLog,
    refuse_other_names,
    training_of,
)
from fedprompt.experiment.run_folder import RunFolder
from fedprompt.experiment.selection import ends_early, select
from fedprompt.federation.checkpoint import Checkpoint
from fedprompt.federation.scores import finite
from fedprompt.federation.server_app import Federation
from fedprompt.methods.base import Tensors
from fedprompt.privacy.releases import FILE as RELEASES
from fedprompt.reports.marks import mark_texts, marks
from fedprompt.reports.run_data import CONFIG, METRICS, PARTITION, STRATEGY, TIMINGS, read_object
from fedprompt.runtime.endings import check_signals
from fedprompt.runtime.peak_memory import peak_memory
from fedprompt.simulation.private_log import PrivateLog

log = logging.getLogger("fedprompt.experiment")

LogLine = Callable[[Mapping[str, Any]], None]
"""Takes one line of `metrics.jsonl`."""


def run_server(
    federation: Federation,
    folder: RunFolder,
    display: Display,
    checkpoint: Checkpoint | None,
    private: PrivateLog | None = None,
    log_line: LogLine = lambda line: None,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Run all rounds after a checkpoint, or all rounds of a new run.

    Args:
        federation: the server's side of a round.
        folder: the run folder, which receives metrics and checkpoints.
        display: shows the progress.
        checkpoint: the checkpoint to continue from; None starts with round 0.
        private: in a simulation, the clients' private tensors, saved with every checkpoint. None in
            a deployment, where they stay on the nodes.
        log_line: called with every line of `metrics.jsonl`, first with those that the folder
            already holds.

    Returns:
        The line of the last round that was run (`evaluation.stop_below` may end a run before its
        last), and the bytes and rejected replies since the run began.

    Raises:
        UserError: the folder or the data do not match the checkpoint, or nodes are missing.
        RunFailed: no round counted, or the prompts have never moved.
    """
    config = federation.config
    rounds = _last_round(federation)
    # Data sets of protocols are opened before training, so that a missing one is noticed now.
    federation.protocols.open()
    federation.join()
    # Opened before the checkpoint is restored, since a strategy then counts what it has released.
    federation.releases.open(folder.path / RELEASES)
    logs = Logs(StrategyLog(folder.path / STRATEGY, config.partition.clients), private)
    federation.tests.record = ProgressOfTest(
        folder, lambda: "" if private is None else private.digest
    )
    first, totals = _continue_from(federation, folder, checkpoint, logs)
    recorded = folder.lines(METRICS)
    if len(recorded) != first:
        raise UserError(
            f"{folder.path / METRICS} lacks rounds that the checkpoint has; the run cannot be "
            f"completed. Start a new one with 'fedprompt run {folder.path / CONFIG} "
            "output.dir=...'."
        )
    for line in recorded:
        log_line(line)
    federation.recall(recorded)
    for text in mark_texts({"marks": marks(recorded, federation.asked)}):
        display.message(f"so far: {text}")
    if note := backbones_note(federation):
        display.message(note)
    if note := federation.common_test.note:
        display.message(note)
    line = recorded[-1] if recorded else {}
    display.start(f"{config.experiment}: {config.method.name}", rounds, first)
    began = time.monotonic()
    for server_round in range(first, rounds + 1):
        # Checked before a round, so that a resumed run ends where the unbroken one would.
        if ends_early(recorded, config.evaluation):
            break
        check_signals()

        # 1 to 5. Sample, send, check, aggregate; evaluate.
        def keep(trained: dict[str, Any], server_round: int = server_round) -> None:
            so_far = totals | {"rejected": federation.rejected}
            logs.save(federation, server_round, so_far, folder, json.dumps(trained))

        trained = training_of(checkpoint) if server_round == first else None
        line, seconds = _one_round(
            federation, server_round, rounds, protocols=True, trained=trained, keep=keep
        )
        # 6. Record, before the checkpoint refers to the line.
        totals["bytes_up"] += line["bytes_up"]
        totals["bytes_down"] += line["bytes_down"]
        totals["rejected"] = federation.rejected
        folder.append(METRICS, line)
        if config.evaluation.stop_below:
            recorded.append(line)
        log_line(line)
        costs = {**seconds, "peak_memory_bytes": peak_memory()}
        folder.append(TIMINGS, {"round": server_round, **costs})
        # 7. Checkpoint.
        if server_round % config.output.checkpoint_every == 0 or server_round == rounds:
            logs.save(federation, server_round, totals, folder)
        # After the checkpoint, since a display may stop the run here and nothing should be lost.
        seconds_per_round = (time.monotonic() - began) / (server_round - first + 1)
        display.round(
            line | {"total_bytes_up": totals["bytes_up"], "total_bytes_down": totals["bytes_down"]},
            seconds_per_round * (rounds - server_round),
        )
    federation.close_faults()
    _refuse_untrained(federation, folder)
    # The protocols' measurements of personal models, for `finish`.
    federation.ask_clients(line["round"])
    return line, totals


def _refuse_untrained(federation: Federation, folder: RunFolder) -> None:
    """Refuse to report prompts as a result that no training has changed.

    Raises:
        RunFailed: no round counted, or the prompts are those of the start.
    """
    rounds = _last_round(federation)
    lines = [line for line in folder.lines(METRICS) if line.get("clients")]
    if not rounds or not lines:
        return
    often = _most_often(lines)
    if not any(line["clients"]["accepted"] for line in lines):
        what = f"no client's update was accepted in any of {len(lines)} rounds"
    elif not any(federation.counted(line) for line in lines):
        needed = federation.config.federation.min_replies
        what = (
            f"none of {len(lines)} rounds counted, since each had fewer valid updates than "
            f"federation.min_replies={needed} or its sum could not be opened"
        )
    elif federation.untrained:
        what = f"the shared prompts have not changed in {len(lines)} rounds"
    else:
        return
    cause = (
        "A learning rate that is too high or too low is a usual cause (training.lr="
        f"{federation.config.training.lr:g})."
    )
    if all(line["clients"]["sampled"] == len(line.get("absent", {})) for line in lines):
        cause = "Nobody could be asked, dropped out or was late: see conditions and clock."
    raise RunFailed(
        f"{what}{often}, so there is no result; {folder.path / METRICS} has the reasons round by "
        f"round. {cause}"
    )


def _most_often(lines: Sequence[Mapping[str, Any]]) -> str:
    """The most frequent reason for which updates were rejected, in brackets; or nothing."""
    reasons = Counter(
        reason
        for line in lines
        for part in ("dropped", "absent")
        for reason in line.get(part, {}).values()
    )
    return f" (most often: {reasons.most_common(1)[0][0]})" if reasons else ""


class NoBaseline(RunFailed):
    """The local-only baseline has no result; that of the run itself is whole."""


def run_reference(
    federation: Federation, record: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run a baseline. It has no checkpoints: after an interruption it starts from round 0 again.

    Args:
        federation: the baseline's federation.
        record: called with the losses and accuracies after every round.

    Returns:
        The last argument of `record`, with the accuracies of the chosen rounds if
        `evaluation.select` asks for them.

    Raises:
        NoBaseline: no client has trained in any round; accuracies of prompts at their start are no
            result.
    """
    rounds = _last_round(federation)
    federation.join()
    recorded: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for server_round in range(rounds + 1):
        check_signals()
        line, _ = _one_round(federation, server_round, rounds)
        if line["clients"] and not line["clients"]["accepted"]:
            failed.append(line)
        names = ("round", "train", "global", "personal", "personal_on_global", "validation")
        recorded.append({name: line[name] for name in names if name in line})
        record(recorded[-1])
    federation.close_faults()
    if rounds and len(failed) == rounds:
        raise NoBaseline(
            f"the local-only baseline has no result: no client's update was accepted in any of "
            f"{rounds} rounds{_most_often(failed)}. The run's own result is not concerned and has "
            "been saved; evaluation.local_only=false leaves the baseline out."
        )
    if federation.config.evaluation.select == "best_validation":
        return recorded[-1] | select(recorded)
    return recorded[-1]


def train_reference(federation: Federation) -> Tensors:
    """Run all rounds of a federation that a protocol compares the run with, without evaluation.

    Like a baseline, it starts from round 0 again after an interruption.

    Args:
        federation: the reference's federation.

    Returns:
        Its final shared tensors, without a client axis.
    """
    federation.join()
    for server_round in range(1, _last_round(federation) + 1):
        check_signals()
        federation.train_round(server_round)
    federation.close_faults()
    return federation.shared


def _last_round(federation: Federation) -> int:
    """The number of the last round; it is 0 for a method without trainable tensors."""
    return federation.config.federation.rounds if federation.method.trainable else 0


def _continue_from(
    federation: Federation,
    folder: RunFolder,
    checkpoint: Checkpoint | None,
    logs: Logs,
) -> tuple[int, dict[str, int]]:
    """Restore a checkpoint, if there is one, and prepare the run folder.

    Returns:
        The next round, and the bytes and rejected replies so far.

    Raises:
        UserError: the data set, its partition or the private tensors do not match the checkpoint.
    """
    totals = {"bytes_up": 0, "bytes_down": 0, "rejected": 0}
    next_round = 0
    description = federation.describe()
    if checkpoint is not None:
        _check_partition(folder, description)
        federation.restore(checkpoint)
        totals, next_round = dict(checkpoint.totals), checkpoint.server_round + 1
        if checkpoint.trained:
            next_round = checkpoint.server_round
    logs.restore(checkpoint, federation.strategy)
    if logs.private is not None and checkpoint is not None:
        refuse_other_names(federation, logs.private)
    # Lines after the checkpoint belong to rounds that will be repeated.
    folder.rewind(next_round - 1)
    folder.write_json(PARTITION, description)
    return next_round, totals


def _check_partition(folder: RunFolder, description: Mapping[str, Any]) -> None:
    """Refuse to continue with data that differ from those at the start of the run."""
    path = folder.path / PARTITION
    if not path.is_file():
        raise UserError(
            f"{path} is missing, so it is not known with which data the run began; restore it from "
            "a copy, or start a new run with 'fedprompt run ... output.dir=...'."
        )
    # A trip through JSON turns tuples into lists and keys into strings, as in the file.
    if read_object(path) != json.loads(json.dumps(description)):
        raise UserError(
            f"the data set, its partition, conditions.trace or clock.devices is not what {path} "
            "says it was when the run began; restore it, or start a new run with "
            "'fedprompt run ... output.dir=...'."
        )


def _one_round(
    federation: Federation,
    server_round: int,
    rounds: int,
    *,
    protocols: bool = False,
    trained: Mapping[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Run steps 1 to 5 of a round.

    Args:
        federation: the server's side of a round.
        server_round: the round; 0 only evaluates.
        rounds: the last round, which is always evaluated on all clients.
        protocols: whether the protocols measure the round as well.
        trained: what `keep` was given, if steps 1 to 4 are done.
        keep: called after step 4 if a test of everyone follows that takes several exchanges, with
            the training part of the line and its seconds.

    Returns:
        The line for `metrics.jsonl`, and the seconds of training and evaluation.
    """
    start = time.monotonic()
    line: dict[str, Any] = {
        "kind": "round",
        "round": server_round,
        "lr": None,
        "train": None,
        "clients": None,
        "bytes_up": 0,
        "bytes_down": 0,
        "client_steps": 0,
    }
    # 1. Sample, 2. send, 3. check, 4. aggregate.
    settings = federation.config.evaluation
    everyone = settings.clients == "all" or server_round == rounds
    train_s = 0.0
    if trained is not None:
        line |= trained["line"]
        train_s = trained["train_s"]
    elif server_round > 0:
        line |= federation.train_round(server_round)
        train_s = time.monotonic() - start
        if everyone and keep is not None and federation.tests.in_parts:
            # The test may take longer than the training, and is not worth repeating it.
            keep({"line": finite(line), "train_s": train_s})
    tests_from = time.monotonic()
    # 5. Evaluate.
    line |= {"global": None, "personal": None, "personal_on_global": None}
    if server_round % settings.every == 0 or server_round == rounds:
        participants = federation.strategy.participants if server_round > 0 else []
        line |= federation.evaluate(server_round, None if everyone else participants)
        if protocols:
            line |= federation.measure_round(line)
    seconds = {"train_s": train_s, "evaluate_s": time.monotonic() - tests_from}
    # Seconds are not part of the line, which must be the same after a resume.
    return finite(line), seconds
