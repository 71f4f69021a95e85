"""A federation on real nodes, which join late, leave and return. Runs in the server app.

A round is the same as in a simulation (`fedprompt.federation`). This module contains only what
differs because the clients are on other machines.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedprompt.backbone.sample import sample_features
from fedprompt.config.schema import WeightFormat
from fedprompt.deploy.node_grid import POLL_S, NodeGrid
from fedprompt.deploy.node_registry import NodeRegistry
from fedprompt.deploy.node_report import ZERO_SHOT
from fedprompt.errors import UserError
from fedprompt.experiment.run_folder import RunFolder
from fedprompt.federation.scores import personal_scores
from fedprompt.federation.screening import TEST_COUNTS, count_ranges
from fedprompt.federation.server_app import Federation
from fedprompt.messages import to_record
from fedprompt.methods.method_config import allows_other_image_towers
from fedprompt.reports.run_data import PARTITION
from fedprompt.workspace import Workspace

log = logging.getLogger("fedprompt.server")
SITES = "sites.json"
"""File in the run folder: policy, last audit entry and versions of every client's node."""


class NodeFederation(Federation):
    """A `Federation` whose clients are nodes; it knows about their data only what they report.

    Args:
        workspace: the server's own workspace; it has no client's images.
        grid: how to reach the nodes.
        folder: the run folder; its `partition.json` is updated when nodes join.
        registered: the client of every registered node id, see `NodeRegistry`.
    """

    def __init__(
        self, workspace: Workspace, grid: NodeGrid, folder: RunFolder, registered: Mapping[int, int]
    ) -> None:
        super().__init__(workspace, grid)
        self.folder = folder
        sample_2D, names = sample_features(workspace.clip), workspace.dataset.class_names
        self.nodes = NodeRegistry(
            grid, workspace.num_clients, names, registered, sample_2D,
            workspace.clip.compression.weights, self._sample_in,
            other_image_towers=allows_other_image_towers(workspace.config.method),
        )  # fmt: skip
        path = folder.path / PARTITION
        self.recorded = json.loads(path.read_text()) if path.is_file() else None
        sites = folder.path / SITES
        self.sites: dict[str, dict[str, Any]] = (
            json.loads(sites.read_text()) if sites.is_file() else {}
        )

    def _sample_in(self, weights: WeightFormat) -> NDArray[np.float32]:
        """Features of the sample by the server's backbone with its weights in another format."""
        compression = replace(self.workspace.clip.compression, weights=weights)
        return sample_features(self.workspace.in_form(compression).clip)

    def backbone_kind(self, client: int) -> str:
        """As the client's node has reported last."""
        report = self.nodes.reports.get(client)
        if report is None:
            return self.config.backbone.weights
        other = self.nodes.has_other_image_tower(report)
        return f"{report.weights}, other image tower" if other else report.weights

    def workspace_like(self, client: int) -> Workspace | None:
        """The server's data through its backbone in the format of a client's node."""
        report = self.nodes.reports.get(client)
        if report is None or self.nodes.has_other_image_tower(report):
            return None
        compression = replace(self.workspace.clip.compression, weights=report.weights)
        return self.workspace.in_form(compression)

    def join(self) -> None:
        """Wait for nodes to join: until all have, or `federation.node_wait_s` has passed.

        Raises:
            UserError: fewer than `federation.min_nodes` (0: all) nodes can take part.
        """
        federation, clients = self.config.federation, self.workspace.num_clients
        required = federation.min_nodes or clients
        deadline = time.monotonic() + federation.node_wait_s
        while True:
            self.nodes.update()
            joined = len(self.nodes.node_of_client)
            # Every node has answered, some of them that they cannot take part.
            all_answered = joined + len(self.nodes.faults) >= clients
            if all_answered or time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        if joined < required:
            reasons = sorted(set(self.nodes.faults.values()))
            faults = "".join(f" {reason.rstrip('.')}." for reason in reasons)
            raise UserError(
                f"{joined} of {clients} nodes can take part after waiting for at most "
                f"{federation.node_wait_s:g} s (federation.node_wait_s), but {required} are "
                f"required (federation.min_nodes); missing: clients {self.nodes.missing}.{faults}"
            )
        if self.nodes.missing:
            log.warning("starting without clients %s", self.nodes.missing)
        self._set_nodes()

    def train_round(self, server_round: int) -> dict[str, Any]:
        """One round with the nodes that are connected now."""
        self._update_nodes(server_round)
        line = super().train_round(server_round)
        self._record_sites(server_round)
        return line

    def describe(self) -> dict[str, Any]:
        """The content of `partition.json`, with the counts that nodes have reported."""
        description = self.workspace.describe()
        if self.workspace.dataset.owners_N is None:
            return description  # every node opens the whole data set, and so does the server
        return description | self.nodes.partition_rows(self.recorded)

    def training_images(self, client: int) -> int:
        """The number of a client's training images, as its node has reported it."""
        if self.workspace.dataset.owners_N is None:
            return super().training_images(client)
        return self.nodes.reports[client].num_train

    @property
    def clients_hold_server_test(self) -> bool:
        """Whether every node opens the whole data set; those with own folders hold theirs alone."""
        return self.workspace.dataset.owners_N is None

    def zero_shot_elsewhere(self) -> dict[str, Any]:
        """Zero-shot accuracy on the nodes' own images, which only the nodes can measure."""
        if self.workspace.dataset.owners_N is None:
            return {}
        rounds = self.config.federation.rounds
        clients = self.strategy.clients
        # Zero-shot CLIP has no prompts, so no tensors are sent.
        ranges, settings = count_ranges(TEST_COUNTS), {ZERO_SHOT: True}
        rows = self.tests.ask(rounds, clients, to_record({}), ranges, settings)
        return {"personal": personal_scores(rows, TEST_COUNTS)}

    def _update_nodes(self, server_round: int) -> None:
        """Update the clients to the nodes that are connected now, and record their image counts."""
        if self.nodes.update():
            self._set_nodes()
            self.recorded = self.describe()
            self.folder.write_json(PARTITION, self.recorded)
        if self.nodes.missing:
            log.warning("round %d: without clients %s", server_round, self.nodes.missing)

    def _record_sites(self, server_round: int) -> None:
        """Write every node's policy, the hash of its last audit entry, and its versions."""
        assert isinstance(self.grid, NodeGrid)
        for client, node in sorted(self.nodes.node_of_client.items()):
            if (site := self.grid.sites.get(node)) is None:
                continue
            before = self.sites.get(str(client))
            if before is not None and before["policy"] != site["policy"]:
                log.warning("client %d now applies the policy %s", client, site["policy"])
            versions = dict(self.nodes.reports[client].versions)
            self.sites[str(client)] = {**site, "round": server_round, "versions": versions}
        if self.sites:
            self.folder.write_json(SITES, self.sites)

    def _set_nodes(self) -> None:
        able = set(self.nodes.able_to_train(self.config.trains_without_labels))
        able -= self.workspace.late
        self.strategy.set_nodes(self.nodes.node_of_client, able)
