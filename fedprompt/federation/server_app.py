"""The server: rounds of sample, send, check, aggregate, evaluate, record.

`Federation` is one method on one grid. `run_server` drives it, writes the run folder and can start
from a checkpoint, which Flower's own `Strategy.start` cannot.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord

from fedprompt.errors import UserError
from fedprompt.evaluation.registry import Finished, open_protocols
from fedprompt.federation.checkpoint import Checkpoint
from fedprompt.federation.client_app import PROTOCOLS
from fedprompt.federation.grid import CountingGrid, Traffic
from fedprompt.federation.registry import strategy_class
from fedprompt.messages import Arrays, client_of, to_arrays, to_record
from fedprompt.methods.base import Tensors
from fedprompt.privacy.local_noise import local_epsilon
from fedprompt.privacy.secure_aggregation import ALIKE, require_flower
from fedprompt.scoring import personal_statistics, score_global
from fedprompt.training import learning_rate
from fedprompt.workspace import Workspace

log = logging.getLogger("fedprompt.server")

CLIENTS_AT_ONCE = 1000
"""Clients tested in one exchange: bounds the messages in memory when everyone is tested."""


class Federation:
    """One method's federation: its shared tensors, its strategy, and the grid it talks to."""

    def __init__(self, workspace: Workspace, grid: CountingGrid) -> None:
        config = workspace.config
        self.workspace, self.grid, self.config = workspace, grid, config
        self.method = workspace.method
        start = self.method.init_shared(config.seed)
        self.strategy = strategy_class(config.strategy.name)(
            config.strategy,
            shapes=workspace.shared_shapes,
            seed=config.seed,
            fraction=config.federation.fraction,
            min_replies=config.federation.min_replies,
            extras={n: t.numpy() for n, t in self.method.init_extras(config.seed).items()},
            rounds=config.federation.rounds,
        )
        self.arrays = to_record({n: t.numpy() for n, t in start.items()})
        self.protocols = open_protocols(config)
        self.rejected = 0
        if config.privacy.noise:
            local_epsilon(config.privacy, 0)  # refuses at once where the accountant is missing
        if config.secure_aggregation.enabled:
            require_flower()
            self._check_weights()
        self.secure: dict[str, Any] = {}
        self.protocol_rows: dict[int, dict[str, Any]] = {}

    def _check_weights(self) -> None:
        """Refuse clients that are known to hold more images than a masked weight can say."""
        partition, most = self.workspace.partition, self.config.secure_aggregation.max_weight
        if self.config.privacy.noise or not self.strategy.weights_by_examples:
            return
        largest = max((len(partition.train(c)) for c in partition.trainable), default=0)
        if largest > most:
            raise UserError(
                f"a client has {largest} training images, more than secure_aggregation.max_weight="
                f"{most}; raise it."
            )

    @property
    def shared(self) -> Tensors:
        """The shared tensors that are evaluated and kept at the end."""
        eval_tensors = self.strategy.eval_tensors(to_arrays(self.arrays))
        return {n: torch.from_numpy(a.copy()) for n, a in eval_tensors.items()}

    def join(self) -> None:
        """Learn which client each node is; a simulation has one for each, known by its id."""
        nodes = {client_of(node): node for node in self.grid.get_node_ids()}
        self.strategy.set_nodes(nodes, self.workspace.partition.trainable)

    def describe(self) -> dict[str, Any]:
        """Who holds how many images of which class, for `partition.json`."""
        return self.workspace.describe()

    def zero_shot_elsewhere(self) -> dict[str, Any]:
        """Zero-shot results that only clients can measure; there are none on this machine."""
        return {}

    def train_round(self, server_round: int) -> dict[str, Any]:
        """One round of training and aggregation; the training part of its metrics line."""
        settings = ConfigRecord()
        if self.config.secure_aggregation.enabled and not self.strategy.weights_by_examples:
            settings[ALIKE] = True
        messages = list(
            self.strategy.configure_train(server_round, self.arrays, settings, self.grid)
        )
        self.secure = {}
        if self.config.secure_aggregation.enabled:
            arrays, metrics, traffic = self._sum_in_secret(server_round, messages)
        else:
            replies, traffic = self._exchange(messages)
            arrays, metrics = self.strategy.aggregate_train(server_round, replies)
        if arrays is not None:
            self.arrays = arrays
        assert metrics is not None
        self.rejected += int(metrics["rejected"])  # type: ignore[arg-type]
        losses = {k: float(v) for k, v in metrics.items() if k.startswith("loss")}  # type: ignore[arg-type]
        return {
            "lr": learning_rate(self.config.training, server_round, self.config.federation.rounds),
            "train": losses or None,
            "clients": {k: metrics[k] for k in ("sampled", "accepted", "rejected")},
            "bytes_up": traffic.up,
            "bytes_down": traffic.down,
            **self._remarks(server_round),
        }

    def _sum_in_secret(
        self, server_round: int, messages: Sequence[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None, Traffic]:
        """One round of the protocol: as `aggregate_train`, and the bytes of all its exchanges."""
        from fedprompt.privacy.secure_aggregation.server import secure_sum
        from fedprompt.privacy.secure_aggregation.vector import decode, size

        settings, shared, traffic = self.config.secure_aggregation, self.strategy.shared, Traffic()

        def exchange(sent: Sequence[Message]) -> list[Message]:
            replies, once = self._exchange(list(sent))
            traffic.down += once.down
            traffic.up += once.up
            return replies

        outcome = secure_sum(
            messages, exchange, settings,
            numbers=size(shared), enough=self.config.federation.min_replies,
        )  # fmt: skip
        client_of_node = self.strategy.client_of_node
        for node, reason in sorted(outcome.silent.items()):
            log.warning("client %d did not help to unmask: %s", client_of_node[node], reason)
        dropped = {client_of_node[node]: reason for node, reason in outcome.dropped.items()}
        if outcome.total is None:
            log.warning("round %d: nothing aggregated: %s", server_round, outcome.void)
            self.secure = {"void": outcome.void}
            return *self.strategy.aggregate_mean(server_round, None, dropped, {}), traffic
        found = decode(outcome.total, shared, settings.clip)
        self.secure = {"clipped": found.cut}
        if found.cut:
            log.warning(
                "round %d: the changes of %d of %d clients were larger than "
                "secure_aggregation.clip=%g and were cut off; raise it",
                server_round, found.cut, len(outcome.counted), settings.clip,
            )  # fmt: skip
        losses = {} if self.config.privacy.noise else {"loss": found.loss}
        arrays = self.strategy.aggregate_mean(server_round, found.change, dropped, losses)
        return *arrays, traffic

    def _remarks(self, server_round: int) -> dict[str, Any]:
        """What a line has only where there is something: the rule's numbers, dropped clients."""
        dropped = {str(client): why for client, why in self.strategy.rejected.items()}
        parts = {
            "strategy": self.strategy.metrics(),
            "dropped": dropped,
            "secure": self.secure,
        }
        if self.config.privacy.noise:
            cost = local_epsilon(self.config.privacy, server_round)
            parts["privacy"] = {"epsilon": cost, "delta": self.config.privacy.delta}
        return {name: part for name, part in parts.items() if part}

    def evaluate(self, server_round: int, clients: Sequence[int] | None = None) -> dict[str, Any]:
        """Global and personal scores, the latter of `clients` (None: all); part of a line."""
        line: dict[str, Any] = {"global": None, "personal": None, "personal_on_global": None}
        wanted, score = self.config.protocols, None
        if "global" in wanted:
            score = score_global(self.method, self.shared, *self.workspace.server_test())
        if score is not None and score.tested:
            line["global"] = {
                "accuracy": score.accuracy,
                "loss": score.loss_sum / score.tested,
            }
        if "personalised" in wanted:
            asked = self.strategy.clients if clients is None else clients
            tables = list(self._tables(server_round, asked))
            line["personal"] = personal_scores(tables, "correct", "num-examples")
            line["personal_on_global"] = personal_scores(tables, "common-correct", "common-tested")
        return line

    def open_protocols(self) -> None:
        """Let the protocols get what they need, so that nothing is missing at the end.

        Raises:
            UserError: something cannot be had.
        """
        for protocol in self.protocols:
            protocol.open(self.workspace)

    def measure_round(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """What the protocols add to the line of an evaluated round."""
        parts = {
            protocol.name: protocol.measure_round(self.workspace, self.shared, line)
            for protocol in self.protocols
        }
        kept = {name: part for name, part in parts.items() if part is not None}
        return {"protocols": kept} if kept else {}

    def ask_clients(self, server_round: int) -> None:
        """Have all clients measure their models for the protocols; while the grid holds these."""
        if not any(p.asks_clients for p in self.protocols):
            return
        for table in self._tables(server_round, self.strategy.clients, {PROTOCOLS: True}):
            names = [n for n in table if n != "client-ids"]
            for place, client in enumerate(table["client-ids"]):
                self.protocol_rows[client] = {n: table[n][place] for n in names}

    def measure_protocols(
        self, rounds: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Results of the protocols that have some of their own, by name."""
        parts = {}
        for protocol in self.protocols:
            own = f"{protocol.name}."
            clients = {
                client: {n.removeprefix(own): v for n, v in row.items() if n.startswith(own)}
                for client, row in sorted(self.protocol_rows.items())
            }
            part = protocol.measure(Finished(self.workspace, self.shared, clients, rounds, summary))
            if part is not None:
                parts[protocol.name] = _finite(part)
        return parts

    def _tables(
        self,
        server_round: int,
        clients: Sequence[int],
        settings: Mapping[str, bool] = MappingProxyType({}),
    ) -> Iterable[Mapping[str, Any]]:
        """Checked metrics of the clients' personal models, a bounded number of them at a time."""
        for first in range(0, len(clients), CLIENTS_AT_ONCE):
            messages = self.strategy.configure_evaluate(
                server_round,
                to_record(self.strategy.eval_tensors(to_arrays(self.arrays))),
                ConfigRecord({**settings}),
                self.grid,
                clients=clients[first : first + CLIENTS_AT_ONCE],
            )
            replies, _ = self._exchange(list(messages))
            table = self.strategy.aggregate_evaluate(server_round, replies)
            if table is not None:
                yield dict(table)

    def _exchange(self, messages: list[Message]) -> tuple[list[Message], Traffic]:
        replies = list(
            self.grid.send_and_receive(messages, timeout=self.config.federation.timeout_s)
        )
        return replies, self.grid.traffic

    def checkpoint(self, server_round: int, totals: dict[str, int]) -> Checkpoint:
        """Everything that a resumed run needs, but for private tensors."""
        state = {n: torch.from_numpy(np.asarray(a)) for n, a in self.strategy.state().items()}
        shared = {n: torch.from_numpy(a.copy()) for n, a in to_arrays(self.arrays).items()}
        return Checkpoint(server_round, shared, state, totals)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint.

        Raises:
            UserError: it belongs to another method or configuration.
        """
        found = {n: tuple(t.shape) for n, t in checkpoint.shared.items()}
        if found != self.strategy.shapes:
            raise UserError(
                f"the checkpoint holds shared tensors {found}, but the config asks for "
                f"{self.strategy.shapes}; it belongs to another configuration."
            )
        self.arrays = to_record({n: t.numpy() for n, t in checkpoint.shared.items()})
        state: Arrays = {n: t.numpy() for n, t in checkpoint.strategy.items()}
        self.strategy.load_state(state)
        self.rejected = checkpoint.totals["rejected"]


def personal_part(clients: Sequence[int], accuracy: Sequence[float]) -> dict[str, Any] | None:
    """Statistics over clients, with the ids of the tested ones and their accuracies in order."""
    statistics = personal_statistics(list(accuracy))
    if statistics is None:
        return None
    return {**statistics.to_json(), "clients": list(clients), "accuracy": list(accuracy)}


def personal_scores(
    tables: Iterable[Mapping[str, Any]], correct: str, tested: str
) -> dict[str, Any] | None:
    """Accuracy by client from checked evaluations: the metric `correct` over `tested`."""
    rows = [
        (client, hits / images)
        for table in tables
        if tested in table
        for client, hits, images in zip(
            table["client-ids"], table[correct], table[tested], strict=True
        )
        if images
    ]
    return personal_part([client for client, _ in rows], [share for _, share in rows])


def _finite(value: Any) -> Any:
    """Non-finite numbers as None: JSON has no NaN, and a diverged loss must not end the run."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
