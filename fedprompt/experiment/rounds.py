"""The loop over rounds of a run: train, evaluate, record, write a checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from fedprompt.errors import UserError
from fedprompt.experiment.display import Display
from fedprompt.experiment.run_folder import RunFolder
from fedprompt.federation.checkpoint import Checkpoint
from fedprompt.federation.server_app import Federation, _finite
from fedprompt.reports.run_data import CONFIG, METRICS, PARTITION, TIMINGS
from fedprompt.simulation.private_log import PrivateLog


def run_server(
    federation: Federation,
    folder: RunFolder,
    display: Display,
    checkpoint: Checkpoint | None,
    private: PrivateLog | None = None,
    log_line: Callable[[Mapping[str, Any]], None] = lambda line: None,
) -> tuple[dict[str, Any], dict[str, int]]:
    """All rounds after `checkpoint` (or from the start); returns the last line and byte totals.

    `private` is the grid's store in a simulation; on real nodes private tensors stay there.
    `log_line` gets every metrics line, those of rounds before `checkpoint` first.
    """
    config = federation.config
    rounds = config.federation.rounds if federation.method.trainable else 0
    federation.open_protocols()
    federation.join()
    totals = {"bytes_up": 0, "bytes_down": 0, "rejected": 0}
    first = 0
    described = federation.describe()
    if checkpoint is not None:
        _check_partition(folder, described)
        federation.restore(checkpoint)
        totals, first = dict(checkpoint.totals), checkpoint.server_round + 1
    if private is not None and checkpoint is not None:
        private.restore(checkpoint.server_round, checkpoint.private)
    elif private is not None:
        private.clear()
    folder.rewind(first - 1)
    folder.write_json(PARTITION, described)
    recorded = folder.lines(METRICS)
    if len(recorded) != first:
        raise UserError(
            f"{folder.path / METRICS} lacks rounds that the checkpoint has; the run cannot be "
            f"completed. Start it anew with 'fedprompt run {folder.path / CONFIG} output.dir=...'."
        )
    for line in recorded:
        log_line(line)
    line = recorded[-1] if recorded else {}
    display.start(f"{config.experiment}: {config.method.name}", rounds, first)
    began = time.monotonic()
    for server_round in range(first, rounds + 1):
        line, seconds = _one_round(federation, server_round, rounds, protocols=True)
        totals["bytes_up"] += line["bytes_up"]
        totals["bytes_down"] += line["bytes_down"]
        totals["rejected"] = federation.rejected
        folder.append(METRICS, line)
        log_line(line)
        folder.append(TIMINGS, {"round": server_round, **seconds})
        if server_round % config.output.checkpoint_every == 0 or server_round == rounds:
            _save(federation.checkpoint(server_round, totals), folder, private)
        done = server_round - first + 1
        eta = (time.monotonic() - began) / done * (rounds - server_round)
        display.round(
            line | {"total_bytes_up": totals["bytes_up"], "total_bytes_down": totals["bytes_down"]},
            eta,
        )
    federation.ask_clients(rounds)
    return line, totals


def _check_partition(folder: RunFolder, described: Mapping[str, Any]) -> None:
    """Refuse to go on with other data than the run began with."""
    path = folder.path / PARTITION
    if path.is_file() and json.loads(path.read_text()) != json.loads(json.dumps(described)):
        raise UserError(
            f"the data set or its partition is not what {path} says it was when the run began; "
            "restore it, or start a new run with 'fedprompt run ... output.dir=...'."
        )


def _save(checkpoint: Checkpoint, folder: RunFolder, private: PrivateLog | None) -> None:
    """Private tensors first, then what refers to them, then what nothing refers to any more."""
    if private is None:
        folder.save_checkpoint(checkpoint)
        return
    digest = private.save(checkpoint.server_round)
    folder.save_checkpoint(replace(checkpoint, private=digest))
    private.remove_stale()


def _one_round(
    federation: Federation, server_round: int, rounds: int, *, protocols: bool = False
) -> tuple[dict[str, Any], dict[str, float]]:
    start = time.monotonic()
    line: dict[str, Any] = {
        "kind": "round",
        "round": server_round,
        "lr": None,
        "train": None,
        "clients": None,
        "bytes_up": 0,
        "bytes_down": 0,
    }
    if server_round > 0:
        line |= federation.train_round(server_round)
    trained = time.monotonic()
    line |= {"global": None, "personal": None, "personal_on_global": None}
    settings = federation.config.evaluation
    if server_round % settings.every == 0 or server_round == rounds:
        everyone = settings.clients == "all" or server_round == rounds
        participants = federation.strategy.participants if server_round > 0 else []
        line |= federation.evaluate(server_round, None if everyone else participants)
        if protocols:
            line |= federation.measure_round(line)
    seconds = {"train_s": trained - start, "evaluate_s": time.monotonic() - trained}
    return _finite(line), seconds


def run_reference(
    federation: Federation, record: Callable[[dict[str, Any]], None]
) -> dict[str, Any] | None:
    """A method beside the one under test (local-only): same rounds, nothing checkpointed."""
    config = federation.config
    rounds = config.federation.rounds if federation.method.trainable else 0
    federation.join()
    last = None
    for server_round in range(rounds + 1):
        line, _ = _one_round(federation, server_round, rounds)
        kept = ("round", "train", "global", "personal", "personal_on_global")
        last = {k: line[k] for k in kept}
        record(last)
    return last
