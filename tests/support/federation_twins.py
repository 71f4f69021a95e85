"""Simulations that a real federation is compared with, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Error, Message, MessageType

from fedprompt.config.schema import Config
from fedprompt.experiment.checkpoint import read_checkpoint
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.rounds import run_server
from fedprompt.experiment.run_folder import RunFolder
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.federation.client_app import handle, server_round
from fedprompt.federation.server_app import Federation
from fedprompt.messages import CLIENT_FAILED
from fedprompt.methods.base import Tensors
from fedprompt.reports.run_data import CHECKPOINT, PRIVATE
from fedprompt.runtime import use_threads
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.simulation.private_log import PrivateLog
from fedprompt.workspace import Workspace


def simulate(
    config: Config,
    folder: Path,
    absent: AbstractSet[tuple[int, int]] = frozenset(),
    trained_in_vain: AbstractSet[tuple[int, int]] = frozenset(),
) -> Path:
    """Simulate an experiment in this process, without the updates that real nodes have lost.

    Args:
        config: the experiment.
        folder: the run folder.
        absent: (client, round) of every lost update; the client does not train.
        trained_in_vain: those of `absent` whose client trains, so that its private tensors change,
            but whose update does not count.

    Returns:
        The run folder.
    """
    config = replace(config, output=replace(config.output, dir=str(folder)))
    use_threads(config.simulation)
    workspace = open_workspace(config)
    run = RunFolder.create(config)
    log = PrivateLog(run.path / PRIVATE, config.partition.clients)

    def answer(
        w: Workspace,
        clients: Sequence[int],
        messages: Sequence[Message],
        private: Mapping[int, Tensors],
    ) -> tuple[list[Message], dict[int, Tensors]]:
        kind = messages[0].metadata.message_type
        if kind != MessageType.TRAIN or (clients[0], server_round(messages[0])) not in absent:
            return handle(w, clients, messages, private)
        if (clients[0], server_round(messages[0])) not in trained_in_vain:
            raise RuntimeError("away")
        changed = handle(w, clients, messages, private)[1]
        return [Message(Error(CLIENT_FAILED, "too late"), reply_to=messages[0])], changed

    grid = InlineGrid(workspace, log, answer=answer)
    try:
        run_server(Federation(workspace, grid), run, QuietDisplay(), None, log)
    finally:
        grid.close()
        run.close()
    return run.path


def dropped(lines: Sequence[Mapping[str, Any]]) -> set[tuple[int, int]]:
    """(client, round) of every update that did not count, according to the metrics lines."""
    return {(int(client), line["round"]) for line in lines for client in line.get("dropped", {})}


def shared_of(path: Path) -> dict[str, bytes]:
    """The bytes of a run's shared tensors at its last checkpoint."""
    checkpoint = read_checkpoint(path / CHECKPOINT)
    return {n: t.numpy().tobytes() for n, t in checkpoint.shared.items()}


def private_of(path: Path, clients: int) -> list[dict[str, bytes]]:
    """The bytes of a simulated run's private tensors at its last checkpoint, by client."""
    checkpoint = read_checkpoint(path / CHECKPOINT)
    log = PrivateLog(path / PRIVATE, clients)
    log.read(checkpoint.server_round, checkpoint.private)
    states = [log.get(c) for c in range(clients)]
    assert all(states)
    return [{n: t.numpy().tobytes() for n, t in (s or {}).items()} for s in states]
