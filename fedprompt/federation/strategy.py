"""The common part of all server strategies: who takes part, and which replies count.

Built on Flower's Message-API `Strategy`. A subclass writes one function, `aggregate`. What Flower's
own strategies leave open is closed here: node ids are random and replies unordered, so clients are
sampled and sorted by client id; no built-in strategy screens replies, so each one is checked
before it counts, and a bad one is dropped, counted and named.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedprompt.config.fields import option
from fedprompt.federation.screening import Update, evaluation_row, read_update, reply_fault
from fedprompt.messages import (
    ARRAYS,
    CONFIG,
    EXTRAS,
    Arrays,
    error_reason,
    sanitised,
    to_arrays,
    to_record,
)
from fedprompt.rng import generator

log = logging.getLogger("fedprompt.strategy")


@dataclass(frozen=True)
class StrategyConfig:
    """What every strategy understands."""

    name: str = option("fedavg", "strategy name")
    max_norm: float = option(1e4, "L2 norm above which a reply's tensors are refused", gt=0)
    max_examples_ratio: float = option(
        1000.0, "times the median number of images above which a reply is refused", ge=1
    )


class SharedPromptStrategy(Strategy):
    """Samples clients, checks replies, and hands them sorted by client id to `aggregate`.

    Args:
        config: the strategy's own config.
        shapes: expected shape of every shared tensor; all are float32.
        seed: keys the draw of participants with the round.
        fraction: share of the trainable clients that trains in a round (at least one).
        min_replies: fewest valid replies for a round to change the shared tensors.
        received: starting values of what clients are sent besides, where the method asks for it.
        rounds: rounds of the whole run.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Any]] = StrategyConfig
    linear_in_updates: ClassVar[bool] = False
    """Whether `aggregate` needs only the weighted mean of the replies; subclasses say it anew."""

    def __init__(
        self,
        config: Any,
        *,
        shapes: Mapping[str, tuple[int, ...]],
        seed: int,
        fraction: float = 1.0,
        min_replies: int = 1,
        extras: Arrays | None = None,
        rounds: int = 1,
    ) -> None:
        self.config = config
        self.extras = dict(extras or {})
        self.rounds = rounds
        self.shapes = dict(shapes)
        self.seed = seed
        self.fraction = fraction
        self.min_replies = min_replies
        self.set_nodes({})
        self.shared: Arrays = {}
        self.sampled: list[int] = []
        self.rejected: dict[int, str] = {}

    @abstractmethod
    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """New shared tensors from the last ones and at least one update, sorted by client id."""

    @classmethod
    def needs_only_the_mean(cls) -> bool:
        """Whether one update that is the mean of all does as well as all of them."""
        return bool(vars(cls).get("linear_in_updates", False))

    @property
    def weights_by_examples(self) -> bool:
        """Whether clients count by their training images in that mean, or all the same."""
        return True

    def client_extras(self, server_round: int, client: int) -> Arrays:
        """What `client` alone is sent besides the shared tensors: the method's starting values."""
        return self.extras

    def client_shared(self, client: int) -> Arrays | None:
        """What `client` is sent in place of the common shared tensors, or None."""
        return None

    def metrics(self) -> dict[str, Any]:
        """What this rule adds to the metrics line of a round that it has aggregated; plain JSON."""
        return {}

    def eval_tensors(self, shared: Arrays) -> Arrays:
        """What is evaluated and kept at the end, made of the shared tensors of a round."""
        return shared

    def state(self) -> Arrays:
        """Server-side tensors beyond the shared ones (momenta, ...) that a resumed run needs."""
        return {}

    def load_state(self, state: Arrays) -> None:
        """Take back what `state` gave."""

    def set_nodes(
        self, node_of_client: Mapping[int, int], trainable: Collection[int] | None = None
    ) -> None:
        """Tell which Flower node holds which client; call again when nodes join or leave.

        Only `trainable` clients (None: all) are asked to train.
        """
        self.node_of_client = dict(sorted(node_of_client.items()))
        self.client_of_node = {node: client for client, node in self.node_of_client.items()}
        self._clients = np.array(list(self.node_of_client), dtype=np.int64)
        able = self._clients if trainable is None else np.array(sorted(trainable), dtype=np.int64)
        self._trainable = self._clients[np.isin(self._clients, able)]

    @property
    def clients(self) -> list[int]:
        """Ids of all known clients, ascending."""
        return [int(c) for c in self._clients]

    @property
    def participants(self) -> list[int]:
        """Ids of the clients whose training counted in the last round, ascending."""
        return [c for c in self.sampled if c not in self.rejected]

    def sample(self, server_round: int) -> list[int]:
        """Sorted ids of the clients that train in a round; depends on seed and round only."""
        known = len(self._trainable)
        count = max(1, round(self.fraction * known))
        if count >= known:
            return [int(c) for c in self._trainable]
        draw = generator(self.seed, "sample", server_round)
        return sorted(int(c) for c in draw.choice(self._trainable, size=count, replace=False))

    # Flower's hooks

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One train message per sampled client."""
        self.shared = to_arrays(arrays)
        self.sampled = self.sample(server_round)
        return self._messages(self.sampled, MessageType.TRAIN, server_round, arrays, config)

    def configure_evaluate(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
        clients: Sequence[int] | None = None,
    ) -> Iterable[Message]:
        """One evaluate message per client in `clients`, else per known client, sampled or not."""
        asked = self.clients if clients is None else clients
        return self._messages(asked, MessageType.EVALUATE, server_round, arrays, config)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check, sort and aggregate; `(None, metrics)` where too few replies are valid."""
        updates, losses = self._accept(list(replies))
        metrics: dict[str, int | float | list[int] | list[float]] = {
            "sampled": len(self.sampled),
            "accepted": len(updates),
            "rejected": len(self.rejected),
        }
        if updates:
            weights = np.array([u.num_examples for u in updates], dtype=np.float64)
            for name in sorted(set.intersection(*(set(m) for m in losses))):
                values = np.array([m[name] for m in losses], dtype=np.float64)
                metrics[name] = float((values * weights).sum() / weights.sum())
        if len(updates) < self.min_replies:
            log.warning(
                "round %d: %d valid replies of %d, fewer than min_replies=%d: nothing aggregated",
                server_round,
                len(updates),
                len(self.sampled),
                self.min_replies,
            )
            return None, MetricRecord(metrics)
        return self._step(server_round, updates), MetricRecord(metrics)

    def aggregate_mean(
        self,
        server_round: int,
        change: Arrays | None,
        dropped: Mapping[int, str],
        losses: Mapping[str, float],
    ) -> tuple[ArrayRecord | None, MetricRecord]:
        """As `aggregate_train`, where nothing but the mean change of the clients is known.

        Args:
            server_round: the round.
            change: weighted mean change of the shared tensors, or None where there is none.
            dropped: why a sampled client has no part in it, by client.
            losses: weighted mean losses.
        """
        self.rejected = {
            client: sanitised(error_reason) for client, error_reason in sorted(dropped.items())
        }
        for client, reason in self.rejected.items():
            log.warning("client %d: not in the sum: %s", client, reason)
        metrics = MetricRecord(
            {
                "sampled": len(self.sampled),
                "accepted": len(self.participants),
                "rejected": len(self.rejected),
                **losses,
            }
        )
        if change is None:
            return None, metrics
        mean = {n: last.astype(np.float64) + change[n] for n, last in self.shared.items()}
        # It stands for all clients, so it has the weight 1 whatever theirs were.
        return self._step(server_round, [Update(-1, mean, 1)]), metrics

    def _step(self, server_round: int, updates: list[Update]) -> ArrayRecord:
        new = self.aggregate(server_round, self.shared, updates)
        self.shared = {k: np.asarray(v, dtype=np.float32) for k, v in new.items()}
        return to_record(self.shared)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """All clients' numeric metrics as lists, sorted by client id, under `client-ids`."""
        rows = self._evaluations(server_round, replies)
        if not rows:
            return None
        clients = sorted(rows)
        merged: dict[str, Any] = {"client-ids": clients}
        for name in rows[clients[0]]:
            values = [rows[c][name] for c in clients]
            # A record takes no list of both kinds, and a client may send either.
            whole = all(isinstance(value, int) for value in values)
            merged[name] = values if whole else [float(value) for value in values]
        return MetricRecord(merged)

    def summary(self) -> None:
        """Log what this strategy does."""
        log.info(
            "%s: shared %s, fraction %g, min_replies %d",
            type(self).__name__,
            self.shapes,
            self.fraction,
            self.min_replies,
        )

    def _messages(
        self,
        clients: Sequence[int],
        message_type: str,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
    ) -> list[Message]:
        settings = ConfigRecord({**config, "server-round": server_round})
        content = RecordDict({ARRAYS: arrays, CONFIG: settings})
        return [
            Message(
                content=self._content(content, server_round, c),
                dst_node_id=self.node_of_client[c],
                message_type=message_type,
                group_id=str(server_round),
            )
            for c in clients
        ]

    def _content(self, common: RecordDict, server_round: int, client: int) -> RecordDict:
        """What all clients are sent, with what this one is sent besides."""
        other, own = self.client_shared(client), self.client_extras(server_round, client)
        if other is not None:
            common = RecordDict({**common, ARRAYS: to_record(other)})
        return RecordDict({**common, EXTRAS: to_record(own)}) if own else common

    def _accept(self, replies: list[Message]) -> tuple[list[Update], list[dict[str, float]]]:
        """Valid updates sorted by client id, with their losses; the rest goes to `rejected`."""
        by_client: dict[int, list[Message]] = {}
        lost: list[str] = []
        for reply in replies:
            client = self.client_of_node.get(reply.metadata.src_node_id)
            if client is not None:
                by_client.setdefault(client, []).append(reply)
            elif reply.has_error():
                # Flower answers for a lost node under its own id, so it cannot be named here.
                lost.append(error_reason(reply))
            else:
                log.warning("node %d is no client: reply ignored", reply.metadata.src_node_id)
        accepted, asked = [], set(self.sampled)
        self.rejected = {}
        for client, own in sorted(by_client.items()):
            reason = self._fault(own) if client in asked else "was not asked to train"
            if reason is None:
                accepted.append(read_update(client, own[0]))
            else:
                self.rejected[client] = sanitised(reason)
        accepted = self._drop_inflated_counts(accepted)
        for client in sorted(asked - set(by_client)):
            self.rejected[client] = sanitised(lost.pop(0)) if lost else "no reply"
        for client, reason in sorted(self.rejected.items()):
            log.warning("client %d: reply dropped: %s", client, reason)
        return [u for u, _ in accepted], [m for _, m in accepted]

    def _drop_inflated_counts(
        self, accepted: list[tuple[Update, dict[str, float]]]
    ) -> list[tuple[Update, dict[str, float]]]:
        """The updates but for those that claim many times as many images as the others."""
        images = sorted(u.num_examples for u, _ in accepted)
        if not images:
            return accepted
        # The lower median: of two clients, one cannot raise it.
        limit = self.config.max_examples_ratio * images[(len(images) - 1) // 2]
        for update, _ in accepted:
            if update.num_examples > limit:
                self.rejected[update.client] = (
                    f"num-examples is {update.num_examples}, above "
                    f"max_examples_ratio={self.config.max_examples_ratio:g} times the median"
                )
        return [pair for pair in accepted if pair[0].client not in self.rejected]

    def _fault(self, replies: list[Message]) -> str | None:
        """Why the reply of a client that was asked must not count, or None."""
        if len(replies) > 1:
            # Which of them counts would depend on the order in which they came.
            return f"replied {len(replies)} times"
        return reply_fault(replies[0], self.shapes, self.config.max_norm)

    def _evaluations(
        self, server_round: int, replies: Iterable[Message]
    ) -> dict[int, dict[str, int | float]]:
        """Checked metrics by client; all rows have the names that most replies have."""
        rows: dict[int, dict[str, int | float]] = {}
        for reply in replies:
            client = self.client_of_node.get(reply.metadata.src_node_id)
            if client is None or reply.has_error():
                log.warning(
                    "round %d: a client could not evaluate: %s", server_round, error_reason(reply)
                )
                continue
            row = evaluation_row(reply)
            if row is None or client in rows:
                log.warning("round %d: client %d: evaluation dropped", server_round, client)
                continue
            rows[client] = row
        if not rows:
            return {}
        counts = Counter(tuple(sorted(row)) for row in rows.values())
        names = max(counts, key=lambda n: (counts[n], n))
        for client in [c for c, row in rows.items() if tuple(sorted(row)) != names]:
            log.warning("round %d: client %d: evaluation dropped", server_round, client)
            del rows[client]
        return rows
