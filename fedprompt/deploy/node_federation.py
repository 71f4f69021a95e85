"""A federation on real nodes: they come late, leave and return, and the rounds go on."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord

from fedprompt.deploy.backbone_check import sample_features
from fedprompt.deploy.node_grid import POLL_S, NodeGrid
from fedprompt.deploy.node_registry import Roster
from fedprompt.deploy.node_report import ZERO_SHOT
from fedprompt.errors import UserError
from fedprompt.experiment.run_folder import RunFolder
from fedprompt.federation.server_app import Federation, personal_scores
from fedprompt.messages import to_record
from fedprompt.reports.run_data import PARTITION
from fedprompt.workspace import Workspace

log = logging.getLogger("fedprompt.server")


class NodeFederation(Federation):
    """`Federation` whose clients are nodes; what the server knows of their data they tell it.

    Args:
        workspace: the server's own; it holds no client's images.
        grid: the nodes.
        folder: the run folder; its `partition.json` follows who joins.
        keyed: client of every registered node id, see `Roster`.
    """

    def __init__(
        self, workspace: Workspace, grid: NodeGrid, folder: RunFolder, keyed: Mapping[int, int]
    ) -> None:
        super().__init__(workspace, grid)
        self.folder = folder
        sample_2D, names = sample_features(workspace.clip), workspace.dataset.class_names
        self.roster = Roster(grid, workspace.num_clients, names, keyed, sample_2D)
        path = folder.path / PARTITION
        self.recorded = json.loads(path.read_text()) if path.is_file() else None

    def join(self) -> None:
        """Wait for the nodes and learn which client each one is.

        Raises:
            UserError: fewer than `federation.min_nodes` (0: all) can take part.
        """
        federation, clients = self.config.federation, self.workspace.num_clients
        needed = federation.min_nodes or clients
        deadline = time.monotonic() + federation.node_wait_s
        while True:
            self.roster.update()
            joined = len(self.roster.node_of_client)
            settled = joined + len(self.roster.faults) >= clients
            if joined == clients or settled or time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        if joined < needed:
            reasons = sorted(set(self.roster.faults.values()))
            faults = "".join(f" {reason.rstrip('.')}." for reason in reasons)
            raise UserError(
                f"{joined} of {clients} nodes can take part after {federation.node_wait_s:g} s at "
                f"most, {needed} are needed (federation.min_nodes); missing: clients "
                f"{self.roster.missing}.{faults}"
            )
        if self.roster.missing:
            log.warning("starting without clients %s", self.roster.missing)
        self._set_nodes()

    def train_round(self, server_round: int) -> dict[str, Any]:
        """One round with the nodes that are there."""
        self._look(server_round)
        return super().train_round(server_round)

    def describe(self) -> dict[str, Any]:
        """Counts of the nodes that have been there, in the form of a simulation's."""
        own = self.workspace.describe()
        if self.workspace.dataset.owners_N is None:
            return own  # every node has all data, and so has the server
        return own | self.roster.described(self.recorded)

    def zero_shot_elsewhere(self) -> dict[str, Any]:
        """Zero-shot accuracy on the nodes' own images, in the form of a simulation's."""
        if self.workspace.dataset.owners_N is None:
            return {}
        rounds = self.config.federation.rounds
        settings = ConfigRecord({ZERO_SHOT: True})
        messages = self.strategy.configure_evaluate(rounds, to_record({}), settings, self.grid)
        replies, _ = self._exchange(list(messages))
        table = self.strategy.aggregate_evaluate(rounds, replies)
        tables = [] if table is None else [dict(table)]
        return {"personal": personal_scores(tables, "correct", "num-examples")}

    def _look(self, server_round: int) -> None:
        """Take in who has come and who has left since the last round."""
        if self.roster.update():
            self._set_nodes()
            self.recorded = self.describe()
            self.folder.write_json(PARTITION, self.recorded)
        if self.roster.missing:
            log.warning("round %d: without clients %s", server_round, self.roster.missing)

    def _set_nodes(self) -> None:
        self.strategy.set_nodes(self.roster.node_of_client, self.roster.trainable)
