"""The server's side of a round: one method's shared tensors, its strategy, and its clients.

`Federation` trains and evaluates one round at a time, in the process of a simulation or in Flower's
ServerApp. The loop over the rounds, with everything that is written to disk, is in
`fedprompt.experiment.rounds`.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from torch import Tensor

from fedprompt.data.features.inputs import Inputs
from fedprompt.data.partition.sessions import in_session
from fedprompt.data.partition.stages import stage_of
from fedprompt.errors import UserError
from fedprompt.evaluation.registry import Finished, open_protocols
from fedprompt.federation.checkpoint import Checkpoint
from fedprompt.federation.client_app import BACKDOOR, COMMON, LABELS, PROTOCOLS, QUERY
from fedprompt.federation.clock import Clock, message_bytes
from fedprompt.federation.common_evaluation import CommonTest, decide
from fedprompt.federation.exchange import Exchange, PlainExchange
from fedprompt.federation.grid import CountingGrid
from fedprompt.federation.personal_evaluation import reported_counts
from fedprompt.federation.registry import strategy_class
from fedprompt.federation.sampling import Clients, attackers
from fedprompt.federation.scores import BACKDOOR_COUNTS, backdoor_part, finite, personal_scores
from fedprompt.federation.screening import (
    COMMON_COUNTS,
    NOT_FINITE,
    TEST_COUNTS,
    VALIDATION_COUNTS,
    Row,
    count_ranges,
    screen_evaluations,
)
from fedprompt.federation.strategy import SharedPromptStrategy
from fedprompt.federation.trace import Trace
from fedprompt.files.tensors import array_checksum
from fedprompt.messages import (
    MAX_EXAMPLES,
    Arrays,
    Exchanged,
    Ranges,
    Traffic,
    client_of,
    to_arrays,
    to_record,
)
from fedprompt.methods.base import Tensors, takes_steps
from fedprompt.methods.parts.schedule import local_steps
from fedprompt.privacy.local_noise import local_epsilon
from fedprompt.privacy.secure_aggregation.exchange import SecureExchange
from fedprompt.scoring import score_global
from fedprompt.training import learning_rate
from fedprompt.workspace import Workspace

log = logging.getLogger("fedprompt.server")

CLIENTS_AT_ONCE = 1000
"""The most clients evaluated in one exchange; their test images are in memory at the same time."""
MESSAGE_BYTES_AT_ONCE = 1 << 30
"""The most bytes of messages in one exchange of an evaluation. Some methods send a client the
prompts of several others, and a thousand such messages do not fit into the memory of a machine."""
DROPPED_OUT = "dropped out, as conditions.dropout or conditions.trace has it"
LATE = "late: "
"""How the reason begins for which a simulated reply that misses the deadline does not count."""


class TestRecord(Protocol):
    """Where the results of a test of many clients are recorded while it goes on."""

    def find(self, test: str, clients: Sequence[int]) -> dict[int, Row] | None:
        """The results of an exchange with these clients, or None if it has to be asked."""

    def add(self, test: str, clients: Sequence[int], rows: Mapping[int, Row]) -> None:
        """Record the results of an exchange."""


class Federation:
    """One method's federation.

    Args:
        workspace: the server's own data, CLIP and method.
        grid: sends messages to the clients and returns their replies.

    Attributes:
        arrays: the present shared tensors, as they are sent.
        strategy: aggregates them.
        rejected: number of training replies that have been rejected since the run began.
        asked: how often each client has been asked to train since the run began.
        releases: what has been released with noise since the run began.
        references: by protocol and name, the shared tensors of the federations that it compares the
            run with; `fedprompt.experiment.run` trains them.
        tested: records the results of a test of many clients while it goes on; None for no record.

    Raises:
        UserError: the strategy does not fit the method, or something that privacy needs is not
            installed or configured.
    """

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
        self.trace = Trace(config.conditions, config.seed, workspace.num_clients)
        self.clock: Clock | None = None
        if config.clock.enabled:
            sizes = message_bytes(workspace.shared_shapes, workspace.extras_shapes)
            self.clock = Clock(config.clock, config.seed, workspace.num_clients, sizes)
        self.arrays = to_record({n: t.numpy() for n, t in start.items()})
        self.takes_steps = takes_steps(self.method)
        if self.clock is not None and config.clock.deadline_s is not None:
            # Rounds differ where images arrive, or labels are asked for, one after the other.
            rounds = range(1, config.federation.rounds + 1)
            fewest = {
                c: min((self._steps(c, r) for r in rounds), default=0) for c in workspace.trainable
            }
            self.clock.check_deadline(fewest)
        self.rejected = 0
        self.asked: Counter[int] = Counter()
        self.releases = self.strategy.releases
        self.protocols = open_protocols(config)
        self.protocol_rows: dict[int, Row] = {}
        self.references: dict[str, dict[str, Tensors]] = {}
        self.tested: TestRecord | None = None
        has_validation = workspace.partition.has_validation or workspace.validates_locally
        if config.evaluation.select == "best_validation" and not has_validation:
            raise UserError(
                f"evaluation.select=best_validation: {config.partition.file} has no validation "
                "images; write one with 'fedprompt data partition ... "
                "partition.local_validation_fraction=0.2'."
            )
        if config.privacy.noise:
            # Without the accountant, this refuses the run before anything is trained.
            local_epsilon(config.privacy, 0)
        if config.partition.labels_per_round:
            self._check_active_learning()
        if config.partition.sessions:
            self._check_sessions()
        # From here every active round starts again.
        self._start = self.arrays
        self.exchange = self._open_exchange()

    def _check_active_learning(self) -> None:
        """Refuse what cannot start again in every active round.

        Raises:
            UserError: the method trains nothing, or the strategy has a state.
        """
        rule, plain = type(self.strategy), SharedPromptStrategy
        kept = (rule.state, rule.changed_client_states)
        if kept != (plain.state, plain.changed_client_states):
            raise UserError(
                f"partition.labels_per_round: strategy '{self.strategy.name}' keeps something from "
                "round to round, which cannot start again in every active round; use fedavg."
            )
        if not self.method.trainable:
            raise UserError(
                f"partition.labels_per_round: method '{self.method.name}' trains nothing."
            )

    def _check_sessions(self) -> None:
        """Refuse sessions in which nothing can be learned, before the first one begins.

        Raises:
            UserError: the method cannot go on with further classes or trains nothing, or there is
                a session without training images.
        """
        method, workspace = self.method, self.workspace
        why = method.no_transfer_reason or ("it trains nothing" if not method.trainable else None)
        if why is not None:
            raise UserError(
                f"partition.sessions: method '{method.name}' cannot go on with further classes "
                f"({why}); use a method with text prompts, such as promptfl."
            )
        options = self.config.partition
        for session in range(1, options.sessions + 1):
            in_session(options, workspace.dataset, workspace.partition, session, self.config.seed)

    def _open_exchange(self) -> Exchange:
        """The exchange of training messages that the config asks for."""
        if not self.config.secure_aggregation.enabled:
            return PlainExchange(self._send, self.strategy)
        partition = self.workspace.partition
        return SecureExchange(
            self._send,
            self.config,
            weights_by_examples=self.strategy.weights_by_examples,
            images=[len(partition.train(client)) for client in self.workspace.trainable],
            clients=self.workspace.round_size,
        )

    @property
    def shared(self) -> Tensors:
        """The tensors of the global model, which is evaluated and saved at the end of the run."""
        tensors = self.strategy.eval_tensors(to_arrays(self.arrays))
        tensors = {**tensors, **self.strategy.eval_extras()}
        # Copied, because a strategy may return arrays that it keeps as its state.
        return {n: torch.from_numpy(a.copy()) for n, a in tensors.items()}

    @property
    def untrained(self) -> bool:
        """Whether the shared tensors are those of the start, bit for bit.

        A method that trains private tensors may leave the shared ones alone, so it is never
        counted as untrained here.
        """
        start = self.method.init_shared(self.config.seed)
        if not start or self.method.init_private(self.config.seed, 0):
            return False
        now = to_arrays(self.arrays)
        return all(np.array_equal(now[name], t.numpy()) for name, t in start.items())

    def counted(self, line: Mapping[str, Any]) -> bool:
        """Whether a round has changed the shared tensors, or could have.

        Args:
            line: the round's line in `metrics.jsonl`.
        """
        if line.get("secure", {}).get("void"):
            return False
        fewest = 1 if self.strategy.steps_without_replies else self.strategy.min_replies
        return bool(line["clients"]["accepted"] >= max(1, fewest))

    def join(self) -> None:
        """Tell the strategy which node is which client; in a simulation, the id determines it."""
        nodes = {client_of(node): node for node in self.grid.get_node_ids()}
        self.strategy.set_nodes(nodes, self.workspace.trainable)

    def _sampled_from(self, server_round: int) -> None:
        """In a class-incremental run, let only clients train that have images of the session."""
        if self.config.partition.sessions:
            able = self.workspace.at(server_round).trainable
            self.strategy.set_nodes(self.strategy.known.node_of_client, able)

    def describe(self) -> dict[str, Any]:
        """Number of images by client and class, for `partition.json`, and checksums of files."""
        files = {"trace": self.trace.digest, "devices": self.clock.digest if self.clock else ""}
        return self.workspace.describe() | {n: digest for n, digest in files.items() if digest}

    def training_images(self, client: int) -> int:
        """The number of a client's training images, from which its number of steps follows.

        A client does not report its steps: with noise or secure aggregation, nothing in its reply
        tells how many images it has.
        """
        return len(self.workspace.partition.train(client))

    def backbone_kind(self, client: int) -> str:
        """What a client's backbone is called where backbones differ."""
        return self.config.backbone.kind_of(client)

    def workspace_like(self, client: int) -> Workspace | None:
        """The server's data through a backbone like that of a client; None if it has none."""
        return self.workspace.of_client(client)

    @property
    def clients_hold_server_test(self) -> bool:
        """Whether the clients have the server's test images; in a simulation they always do."""
        return True

    @cached_property
    def common_test(self) -> CommonTest:
        """When the personal models are tested on the server's test images, decided once."""
        if not self.clients_hold_server_test:
            return CommonTest()
        images = [self.training_images(client) for client in self.workspace.trainable]
        return decide(self.workspace, self.strategy, images)

    def zero_shot_elsewhere(self) -> dict[str, Any]:
        """Zero-shot results that only clients can measure; in a simulation there are none."""
        return {}

    # Training

    def train_round(self, server_round: int) -> dict[str, Any]:
        """Train one round.

        Args:
            server_round: the round, from 1.

        Returns:
            The training part of the round's line in `metrics.jsonl`.
        """
        # The tensors that have been evaluated so far will not be evaluated again.
        self.workspace.at(server_round).memo.clear()
        self._sampled_from(server_round)
        labels = self._begin_active_round(server_round)
        # 1. Sample: the strategy draws the clients and writes their messages.
        messages = self._sample(server_round)
        if self.config.privacy.noise:
            # Recorded before clients are asked: their noise is new if a resumed run asks again.
            self.releases.add("clients", server_round, self.strategy.sampled)
        # 2. Send, and 3. check: the exchange returns what may be aggregated.
        times = self._seconds(server_round, self.strategy.sampled)
        absent = self._absent(server_round, times)
        self.grid.silent = absent
        exchanged = self.exchange.train(server_round, self.strategy.shared, messages)
        exchanged = exchanged.without(absent)
        # 4. Aggregate: the strategy computes the new shared tensors, if there is enough to do so.
        arrays = self.strategy.finish_round(server_round, exchanged)
        # With too few valid replies, the next round starts from the same tensors.
        if arrays is not None:
            self.arrays = arrays
        self.rejected += len(exchanged.dropped)
        self.asked.update(self.strategy.sampled)
        line = self._training_line(server_round, exchanged) | labels
        if self.clock is not None:
            seconds = self.clock.round_seconds(times, absent)
            line["clock"] = {"seconds": seconds, "clients": {str(c): s for c, s in times.items()}}
        return line

    def _begin_active_round(self, server_round: int) -> dict[str, Any]:
        """In active learning, have all clients ask for labels, and start prompts again.

        Returns:
            The entry `labels` of the round's line, if an active round begins.
        """
        stage = stage_of(self.config, server_round)
        if not (self.config.partition.labels_per_round and stage.begins):
            return {}
        unlabelled = self.workspace.partition.unlabelled
        asked = [c for c in self.strategy.known.trainable if c not in unlabelled]
        # They select with the model of the round before, which a node has stored under its number.
        rows = dict(
            self._client_rows(
                server_round - 1,
                asked,
                self._eval_arrays(),
                {LABELS: (0, MAX_EXAMPLES)},
                {QUERY: stage.number},
            )
        )
        self.arrays = self._start
        total = sum(int(row[LABELS]) for row in rows.values())
        return {"labels": {"active_round": stage.number, "clients": len(rows), "asked": total}}

    def _sample(self, server_round: int) -> dict[int, Message]:
        """The training messages of a round, by client id."""
        with self._only_present(server_round):
            messages = list(
                self.strategy.configure_train(
                    server_round, self.arrays, self.exchange.settings(), self.grid
                )
            )
        client_of_node = self.strategy.known.client_of_node
        return {client_of_node[m.metadata.dst_node_id]: m for m in messages}

    @contextmanager
    def _only_present(self, server_round: int) -> Iterator[None]:
        """Within it, the strategy knows who can be asked in a round; tests reach everyone."""
        known = self.strategy.known
        if not self.trace.trivial:
            present = self.trace.present(server_round, known.trainable)
            self.strategy.known = Clients(known.node_of_client, known.trainable, present)
        try:
            yield
        finally:
            self.strategy.known = known

    def _seconds(self, server_round: int, clients: Sequence[int]) -> dict[int, float]:
        """The simulated seconds of clients in a round; empty without a clock."""
        if self.clock is None:
            return {}
        steps = {c: self._steps(c, server_round) for c in clients}
        return {c: self.clock.seconds(server_round, c, n) for c, n in steps.items()}

    def _absent(self, server_round: int, times: Mapping[int, float]) -> dict[int, str]:
        """Why sampled clients will not reply in time.

        They are known before they are asked, so nobody trains in vain: a client that is late has
        lost its work, and keeps its private tensors as they were.

        Args:
            server_round: the round.
            times: the result of `_seconds`.

        Returns:
            The reasons by client id.
        """
        absent = {}
        for client in self.strategy.sampled:
            if self.trace.drops_out(server_round, client):
                absent[client] = DROPPED_OUT
            elif self.clock is not None and self.clock.is_late(times[client]):
                deadline = self.config.clock.deadline_s
                absent[client] = f"{LATE}{times[client]:.3g} s, clock.deadline_s={deadline:g}"
        return absent

    def _steps(self, client: int, server_round: int) -> int:
        """The optimiser steps that a client takes in a round."""
        if not self.takes_steps:
            return 0
        return local_steps(self._images_in(client, server_round), self.config.training)

    def _training_line(self, server_round: int, exchanged: Exchanged) -> dict[str, Any]:
        """The training part of a round's line, in the order in which it is written."""
        config = self.config
        stage = stage_of(config, server_round)
        line = {
            "lr": learning_rate(
                config.training, stage.server_round, stage.rounds, config.method.lr_cycles
            ),
            "train": exchanged.losses or None,
            "clients": {
                "sampled": len(self.strategy.sampled),
                "accepted": exchanged.accepted,
                "rejected": len(exchanged.dropped),
                **({"absent": len(exchanged.absent)} if exchanged.absent else {}),
                **self._without_labels(),
            },
            "bytes_up": exchanged.traffic.up,
            "bytes_down": exchanged.traffic.down,
            "client_steps": sum(self._steps(c, server_round) for c in exchanged.trained),
        }
        remarks: dict[str, Any] = {
            "statistics": exchanged.statistics,
            "strategy": self.strategy.metrics(),
            "dropped": {str(client): reason for client, reason in exchanged.dropped.items()},
            "absent": {str(client): reason for client, reason in exchanged.absent.items()},
            "diverged": {str(client): what for client, what in exchanged.diverged.items()},
            **exchanged.remarks,
        }
        if config.privacy.noise:
            # A client pays for every round that it is asked for, and again if one is repeated.
            times = server_round + self.releases.repeated("clients")
            spent = local_epsilon(config.privacy, times)
            remarks["privacy"] = {"epsilon": spent, "delta": config.privacy.delta}
        return line | {name: part for name, part in remarks.items() if part}

    def _images_in(self, client: int, server_round: int) -> int:
        """The number of images that a client trains on in a round."""
        if self.config.partition.sessions:
            return len(self.workspace.at(server_round).partition.train(client))
        images, per_round = self.training_images(client), self.config.partition.labels_per_round
        if not per_round or self.config.method.learns_without_labels:
            return images
        return min(images, stage_of(self.config, server_round).number * per_round)

    def _without_labels(self) -> dict[str, int]:
        """How many of the sampled clients have no labels, in a run in which such clients train."""
        unlabelled = self.workspace.partition.unlabelled
        if not (unlabelled and self.config.method.learns_without_labels):
            return {}
        return {"unlabelled": len(unlabelled & set(self.strategy.sampled))}

    def _send(self, messages: Sequence[Message]) -> tuple[list[Message], Traffic]:
        """Send messages and wait for replies, at most `federation.timeout_s` seconds."""
        timeout = self.config.federation.timeout_s
        replies = list(self.grid.send_and_receive(messages, timeout=timeout))
        return replies, self.grid.traffic

    # Evaluation

    @property
    def tests_in_parts(self) -> bool:
        """Whether a test of everyone takes several exchanges."""
        return len(self.strategy.clients) > self.clients_at_once

    @cached_property
    def clients_at_once(self) -> int:
        """Clients evaluated in one exchange.

        It follows from the tensors' shapes, so a resumed run asks the same clients together.
        """
        shapes = [*self.workspace.shared_shapes.values(), *self.workspace.extras_shapes.values()]
        message = 4 * sum(map(math.prod, shapes))  # all are float32
        return min(CLIENTS_AT_ONCE, max(1, MESSAGE_BYTES_AT_ONCE // max(1, message)))

    def evaluate(self, server_round: int, clients: Sequence[int] | None = None) -> dict[str, Any]:
        """Evaluate the global and the personal models.

        Args:
            server_round: the round, 0 before any training.
            clients: ids of the clients whose personal models are evaluated; None for all.

        Returns:
            The parts `global`, `personal` and `personal_on_global` of the round's line; a part is
            None if the config does not ask for it, not in this round (`common_test`) or nothing
            could be tested. With attackers that plant a backdoor, `backdoor` says how often it
            works. If there are validation images, `validation` has the parts `global` and
            `personal` on those.
        """
        line: dict[str, Any] = {"global": None, "personal": None, "personal_on_global": None}
        validation: dict[str, Any] = {"global": None, "personal": None}
        workspace, protocols = self.workspace.at(server_round), self.config.protocols
        if "global" in protocols:
            line["global"] = self._global_part(workspace, *workspace.server_test())
            validation["global"] = self._global_part(workspace, *workspace.server_validation())
        if "personalised" in protocols:
            asked = self.strategy.clients if clients is None else clients
            last = self.config.federation.rounds if self.method.trainable else 0
            common = self.common_test.due(server_round, last=server_round == last)
            measured = common and not self.common_test.is_global
            ranges = count_ranges(*reported_counts(workspace, common=measured))
            settings = {COMMON: True} if measured else {}
            rows = dict(
                self._client_rows(server_round, asked, self._eval_arrays(), ranges, settings)
            )
            if common and not measured:
                self._add_global_score(workspace, rows)
            line["personal"] = personal_scores(rows, TEST_COUNTS)
            line["personal_on_global"] = personal_scores(rows, COMMON_COUNTS)
            validation["personal"] = personal_scores(rows, VALIDATION_COUNTS)
        if any(validation.values()):
            line["validation"] = validation
        if self.config.attack.kind == "backdoor" and self.method.has_global:
            line["backdoor"] = self._backdoor_part(server_round)
        return line

    def _backdoor_part(self, server_round: int) -> dict[str, Any] | None:
        """How often the attackers' backdoor works on the global model; only they know a trigger."""
        bad = attackers(self.config.seed, self.config.partition.clients, self.config.attack.share)
        tested, *hits = BACKDOOR_COUNTS
        ranges: Ranges = {tested: (0, MAX_EXAMPLES), **dict.fromkeys(hits, (0, tested))}
        asked = [client for client in self.strategy.clients if client in bad]
        rows = self._client_rows(server_round, asked, self._eval_arrays(), ranges, {BACKDOOR: True})
        return backdoor_part(dict(rows))

    def _global_part(
        self, workspace: Workspace, inputs_N: Inputs, labels_N: Tensor
    ) -> dict[str, Any] | None:
        """Accuracy and mean loss of the global model on some of the server's images.

        A model that is not finite also has the number of `unanswered` images, counted as wrong.
        """
        # A server without images has no accuracy, and 0 of 0 is not 0 %.
        if not len(labels_N):
            return None
        score = score_global(workspace.method, self.shared, inputs_N, labels_N, workspace.memo)
        if score is None:
            return None
        part = {"accuracy": score.accuracy, "loss": score.loss_sum / score.tested}
        return part | ({"unanswered": score.unanswered} if score.unanswered else {})

    def _add_global_score(self, workspace: Workspace, rows: Mapping[int, Row]) -> None:
        """Add the global model's score on the server's test images to every client's row.

        Where it is every client's model (`CommonTest.is_global`), clients would report the same.
        """
        test = workspace.server_test()
        score = score_global(workspace.method, self.shared, *test, workspace.memo)
        assert score is not None
        tested, correct = COMMON_COUNTS
        for row in rows.values():
            row |= {tested: score.tested, correct: score.correct}
            if score.unanswered:
                row[NOT_FINITE] = 1

    def _eval_arrays(self) -> ArrayRecord:
        """The shared tensors that are evaluated, as they are sent."""
        return to_record(self.strategy.eval_tensors(to_arrays(self.arrays)))

    def _client_rows(
        self,
        server_round: int,
        clients: Sequence[int],
        arrays: ArrayRecord,
        ranges: Ranges,
        settings: Mapping[str, bool | int] = MappingProxyType({}),
    ) -> Iterator[tuple[int, Row]]:
        """Evaluate on clients, at most `clients_at_once` in one exchange.

        Args:
            server_round: the round that the messages belong to.
            clients: ids of the clients to ask.
            arrays: shared tensors to evaluate.
            ranges: the metrics that the clients report, and within which limits.
            settings: entries that are added to the settings in the messages.

        Yields:
            A client's id and its checked metrics.
        """
        at_once = self.clients_at_once
        # A query changes what clients know, so a resumed run must ask again.
        record = self.tested if len(clients) > at_once and QUERY not in settings else None
        test = ""
        if record:
            tensors = array_checksum(to_arrays(arrays))[:16]
            test = f"{server_round} {sorted(settings)} {tensors}"
        for first in range(0, len(clients), at_once):
            part = clients[first : first + at_once]
            rows = record.find(test, part) if record else None
            if rows is None:
                config = ConfigRecord({**settings})
                asked = list(
                    self.strategy.configure_evaluate(
                        server_round, arrays, config, self.grid, clients=part
                    )
                )
                replies, _ = self._send(asked)
                known = self.strategy.known.client_of_node
                faults = self.strategy.evaluation_faults
                rows = screen_evaluations(asked, replies, known, ranges, faults)
                if record:
                    record.add(test, part, rows)
            yield from rows.items()

    # Protocols

    def open_protocols(self) -> None:
        """Open the data of every protocol, so that a missing file is noticed before the training.

        Raises:
            UserError: a protocol's data set or file cannot be opened.
        """
        for protocol in self.protocols:
            protocol.open(self.workspace)

    def measure_round(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """What the evaluation protocols add to the line of an evaluated round.

        Args:
            line: the round's line in `metrics.jsonl` so far.

        Returns:
            The entry `protocols`, or nothing if no protocol measures single rounds.
        """
        parts = {
            protocol.name: protocol.measure_round(self.workspace, self.shared, line)
            for protocol in self.protocols
        }
        parts = {name: part for name, part in parts.items() if part is not None}
        return {"protocols": parts} if parts else {}

    def ask_clients(self, server_round: int) -> None:
        """Have all clients measure for the protocols, while the grid has their private tensors."""
        asking = [protocol for protocol in self.protocols if protocol.asks_clients]
        if asking:
            ranges: dict[str, tuple[float, float | str]] = {}
            for protocol in asking:
                ranges |= _prefixed(protocol.name, protocol.client_numbers(self.workspace))
            clients, arrays = self.strategy.clients, self._eval_arrays()
            rows = self._client_rows(server_round, clients, arrays, ranges, {PROTOCOLS: True})
            self.protocol_rows.update(rows)

    def measure_protocols(
        self, rounds: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Results of the protocols at the end of a run.

        Args:
            rounds: all lines of rounds in `metrics.jsonl`.
            summary: the run's summary so far.

        Returns:
            What each protocol measures, as plain JSON by the protocol's name.
        """
        parts = {}
        for protocol in self.protocols:
            prefix = f"{protocol.name}."
            clients = {
                client: {n.removeprefix(prefix): v for n, v in row.items() if n.startswith(prefix)}
                for client, row in sorted(self.protocol_rows.items())
            }
            references = self.references.get(protocol.name, {})
            part = protocol.measure(
                Finished(self.workspace, self.shared, clients, rounds, summary, references)
            )
            if part is not None:
                parts[protocol.name] = finite(part)
        return parts

    # Faults

    def recall(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Count the faults of earlier rounds, which are not logged again.

        Args:
            lines: the rounds of the run in `metrics.jsonl` so far.
        """
        for line in lines:
            dropped = {int(c): reason for c, reason in line.get("dropped", {}).items()}
            self.strategy.faults.add(dropped, known=True)

    def close_faults(self) -> None:
        """Log how often faults came again since the run began."""
        self.exchange.close()
        self.strategy.faults.close()
        self.strategy.evaluation_faults.close()

    # Checkpoints

    def checkpoint(self, server_round: int, totals: dict[str, int]) -> Checkpoint:
        """Everything that a resumed run needs, except for what belongs to single clients.

        Args:
            server_round: the last complete round.
            totals: bytes and rejected replies since the run began.

        Returns:
            A checkpoint with copies of all tensors, so that later rounds do not change it.
        """
        state = {
            n: torch.from_numpy(np.asarray(a)) for n, a in self.strategy.common_state().items()
        }
        shared = {n: torch.from_numpy(a.copy()) for n, a in to_arrays(self.arrays).items()}
        return Checkpoint(server_round, shared, state, totals, secret=self.strategy.secret_state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Return to the state of a checkpoint.

        Raises:
            UserError: the checkpoint belongs to another method or configuration.
        """
        # Without this check, tensors of another method would fail later, in the clients.
        shapes = {n: tuple(t.shape) for n, t in checkpoint.shared.items()}
        if shapes != self.strategy.shapes:
            raise UserError(
                f"the checkpoint holds shared tensors {shapes}, but the config asks for "
                f"{self.strategy.shapes}; it belongs to another configuration."
            )
        self.arrays = to_record({n: t.numpy() for n, t in checkpoint.shared.items()})
        state: Arrays = {n: t.numpy() for n, t in checkpoint.strategy.items()}
        self.strategy.load_state(state)
        self.rejected = checkpoint.totals["rejected"]
        # Drawn again: which clients train depends on the seed and the round only.
        for server_round in range(1, checkpoint.server_round + 1):
            self._sampled_from(server_round)
            with self._only_present(server_round):
                self.asked.update(self.strategy.sample(server_round))


def _prefixed(protocol: str, ranges: Ranges) -> dict[str, tuple[float, float | str]]:
    """The ranges of a protocol's numbers under the names that clients give them in a reply."""
    return {
        f"{protocol}.{name}": (low, f"{protocol}.{high}" if isinstance(high, str) else high)
        for name, (low, high) in ranges.items()
    }
