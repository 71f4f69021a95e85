"""What belongs to single clients, in logs beside a run's checkpoint.

The loop over rounds saves and restores them together with the checkpoint; `predict` reads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedprompt.experiment.run_folder import RunFolder
from fedprompt.federation.checkpoint import Checkpoint
from fedprompt.federation.screening import Row
from fedprompt.federation.server_app import Federation
from fedprompt.federation.strategy import SharedPromptStrategy
from fedprompt.files.client_log import ClientLog
from fedprompt.optimizer import without_momentum
from fedprompt.reports.run_data import TESTED
from fedprompt.simulation.private_log import PrivateLog
from fedprompt.workspace import check_private


class StrategyLog(ClientLog):
    """What a strategy knows about single clients, such as their last uploads."""

    what = "the strategy's states"


def load_client_states(strategy: SharedPromptStrategy, log: ClientLog) -> None:
    """Give a strategy what a log holds about every client."""
    for client in range(0 if log.empty else log.num_clients):
        if known := log.get(client):
            strategy.load_client_state(client, {n: t.numpy() for n, t in known.items()})


@dataclass(frozen=True)
class Logs:
    """The logs of a run.

    Attributes:
        strategy: what the strategy knows about single clients.
        private: in a simulation, their private tensors.
    """

    strategy: ClientLog
    private: PrivateLog | None

    def restore(self, checkpoint: Checkpoint | None, strategy: SharedPromptStrategy) -> None:
        """Return to a checkpoint, or to the start of a run.

        Args:
            checkpoint: the checkpoint, or None.
            strategy: receives what is known about single clients.

        Raises:
            UserError: a file is missing or damaged, or cannot be removed.
        """
        if checkpoint is not None and checkpoint.clients:
            self.strategy.restore(checkpoint.server_round, checkpoint.clients)
        else:
            self.strategy.clear()
        load_client_states(strategy, self.strategy)
        if self.private is not None and checkpoint is not None:
            self.private.restore(checkpoint.server_round, checkpoint.private)
        elif self.private is not None:
            self.private.clear()

    def save(
        self,
        federation: Federation,
        server_round: int,
        totals: dict[str, int],
        folder: RunFolder,
        trained: str = "",
    ) -> None:
        """Write a checkpoint such that a crash at any point leaves a complete one.

        Args:
            federation: the server's side of a round.
            server_round: the last complete round.
            totals: bytes and rejected replies since the run began.
            folder: the run folder.
            trained: see `Checkpoint.trained`.

        Raises:
            UserError: the disk is full, or a file cannot be written.
        """
        checkpoint = federation.checkpoint(server_round, totals)
        # New tensors of clients are written first and stale ones removed last: whichever checkpoint
        # is on disk, the tensors that it refers to are there as well.
        for client, arrays in federation.strategy.changed_client_states():
            self.strategy.put(client, {n: torch.from_numpy(a) for n, a in arrays.items()})
        known = self.strategy.save(server_round)
        checkpoint = replace(
            checkpoint,
            private="" if self.private is None else self.private.save(server_round),
            clients="" if self.strategy.empty else known,
            trained=trained,
        )
        folder.save_checkpoint(checkpoint, federation.config)
        self.strategy.remove_stale()
        if self.private is not None:
            self.private.remove_stale()


class ProgressOfTest:
    """Results of the clients that were asked so far, while a test of everyone goes on.

    `tested.jsonl` has one line per exchange. A run that is resumed in the middle of the test does
    not ask these clients again. Results count only for the tensors on which they were measured, so
    that a test that begins anew does not find those of another one.

    Args:
        folder: the run folder.
        private: identifies the clients' private tensors.
    """

    def __init__(self, folder: RunFolder, private: Callable[[], str]) -> None:
        self._folder, self._private = folder, private
        self._lines = folder.lines(TESTED)

    def find(self, test: str, clients: Sequence[int]) -> dict[int, Row] | None:
        """The results of an exchange, or None if it has not been recorded.

        Args:
            test: identifies what is tested.
            clients: the clients of the exchange.
        """
        wanted = self._named(test)
        for line in self._lines:
            if line["test"] == wanted and line["clients"] == list(clients):
                return {int(client): row for client, row in line["rows"].items()}
        return None

    def add(self, test: str, clients: Sequence[int], rows: Mapping[int, Row]) -> None:
        """Record the results of an exchange.

        Args:
            test: identifies what is tested.
            clients: the clients that were asked.
            rows: the results by client; of some there may be none.

        Raises:
            UserError: the disk is full, or the file cannot be written.
        """
        line = {
            "test": self._named(test),
            "clients": list(clients),
            "rows": {str(client): dict(row) for client, row in rows.items()},
        }
        if not self._lines or self._lines[-1]["test"] != line["test"]:
            # Of an earlier test, which has ended or has been repeated with other tensors.
            remove_tested(self._folder.path)
            self._lines = []
        self._folder.append(TESTED, line)
        self._lines.append(line)

    def _named(self, test: str) -> str:
        return f"{test} {self._private()}"


def refuse_other_names(federation: Federation, private: PrivateLog) -> None:
    """Refuse private tensors of another version; all clients have the same names.

    Raises:
        UserError: the tensors are not those that the method has.
    """
    clients = range(federation.workspace.num_clients)
    stored = (without_momentum(private.get(client) or {})[0] for client in clients)
    if first := next((tensors for tensors in stored if tensors), None):
        check_private(federation.method, first, federation.config.seed)


def remove_tested(run_dir: Path) -> None:
    """Remove the results of a test of everyone, which the run's own files now have."""
    (run_dir / TESTED).unlink(missing_ok=True)


def training_of(checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    """The training part of the round that a checkpoint has trained and not tested, if it is one."""
    if checkpoint is None or not checkpoint.trained:
        return None
    trained: dict[str, Any] = json.loads(checkpoint.trained)
    return trained
