"""The server's side of a round: one method's shared tensors, its strategy, and its clients.

`Federation` trains and evaluates one round at a time, in the process of a simulation or in Flower's
ServerApp. The loop over the rounds, with everything that is written to disk, is in
`fedprompt.experiment.rounds`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from torch import Tensor

from fedprompt.data.features.inputs import Inputs
from fedprompt.data.partition.stages import stage_of
from fedprompt.errors import UserError
from fedprompt.federation.checkpoint import Checkpoint
from fedprompt.federation.client_app import BACKDOOR, COMMON, LABELS, PROTOCOLS, QUERY
from fedprompt.federation.client_tests import ClientTests
from fedprompt.federation.common_evaluation import CommonTest, decide
from fedprompt.federation.exchange import Exchange, PlainExchange
from fedprompt.federation.grid import CountingGrid
from fedprompt.federation.personal_evaluation import reported_counts
from fedprompt.federation.presence import Presence
from fedprompt.federation.protocol_results import ProtocolResults
from fedprompt.federation.pseudo_labelling import LABELLING, PseudoLabels, count_ranges_of
from fedprompt.federation.refusals import check_federation
from fedprompt.federation.registry import strategy_class
from fedprompt.federation.sampling import attackers
from fedprompt.federation.scores import BACKDOOR_COUNTS, backdoor_part, personal_scores
from fedprompt.federation.screening import (
    COMMON_COUNTS,
    NOT_FINITE,
    TEST_COUNTS,
    VALIDATION_COUNTS,
    Row,
    count_ranges,
)
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
from fedprompt.privacy.image_epsilon import image_epsilon
from fedprompt.privacy.local_noise import local_epsilon
from fedprompt.privacy.secure_aggregation.exchange import SecureExchange
from fedprompt.scoring import score_global
from fedprompt.training import learning_rate
from fedprompt.workspace import Workspace

log = logging.getLogger("fedprompt.server")


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
        pseudo: the pseudo-labels of clients without labels, in the present phase.
        releases: what has been released with noise since the run began.
        presence: who can be asked and who answers, in the conditions that a simulation sets.
        protocols: the evaluation protocols and what they have measured.
        tests: asks clients to evaluate.

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
        self.presence = Presence(workspace)
        self.arrays = to_record({n: t.numpy() for n, t in start.items()})
        self.takes_steps = takes_steps(self.method)
        self.pseudo = PseudoLabels(len(workspace.task.class_names))
        if self.presence.clock is not None and config.clock.deadline_s is not None:
            # Rounds differ where images arrive, or labels are asked for, one after the other.
            rounds = range(1, config.federation.rounds + 1)
            fewest = {
                c: min((self._steps(c, r) for r in rounds), default=0) for c in workspace.trainable
            }
            self.presence.clock.check_deadline(fewest)
        self.rejected = 0
        self.asked: Counter[int] = Counter()
        self.releases = self.strategy.releases
        self.protocols = ProtocolResults(workspace)
        self.tests = ClientTests(workspace, self.strategy, grid, self._send)
        check_federation(workspace, self.strategy)
        # From here every active round starts again.
        self._start = self.arrays
        self.exchange = self._open_exchange()

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
        return self.workspace.describe() | self.presence.digests

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
        labels = self._begin_active_round(server_round) | self._begin_phase(server_round)
        # 1. Sample: the strategy draws the clients and writes their messages.
        messages = self._sample(server_round)
        if self.config.privacy.noise or self.config.privacy.image_noise:
            # Recorded before clients are asked: their noise is new if a resumed run asks again.
            self.releases.add("clients", server_round, self.strategy.sampled)
        # 2. Send, and 3. check: the exchange returns what may be aggregated.
        sampled = self.strategy.sampled
        times = self._seconds(server_round, sampled)
        absent = self.presence.absent(server_round, sampled, times)
        self.grid.silent = absent
        exchanged = self.exchange.train(server_round, self.strategy.shared, messages)
        exchanged = exchanged.without(absent)
        # 4. Aggregate: the strategy computes the new shared tensors, if there is enough to do so.
        arrays = self.strategy.finish_round(server_round, exchanged)
        # With too few valid replies, the next round starts from the same tensors.
        if arrays is not None:
            self.arrays = self._refined(server_round, arrays, exchanged)
        self.rejected += len(exchanged.dropped)
        self.asked.update(self.strategy.sampled)
        line = self._training_line(server_round, exchanged) | labels
        if self.presence.clock is not None:
            seconds = self.presence.clock.round_seconds(times, absent)
            line["clock"] = {"seconds": seconds, "clients": {str(c): s for c, s in times.items()}}
        return line

    def _refined(self, server_round: int, arrays: ArrayRecord, exchanged: Exchanged) -> ArrayRecord:
        """The aggregated tensors, which some methods go on training on the server."""
        if not (self.config.method.refines and exchanged.updates):
            return arrays

        def tensors(of: Arrays) -> Tensors:
            return {n: torch.from_numpy(a.copy()) for n, a in of.items()}

        refined = self.method.refine(
            tensors(to_arrays(arrays)),
            [tensors(update.arrays) for update in exchanged.updates],
            seed=self.config.seed,
            server_round=server_round,
        )
        return to_record({n: t.numpy() for n, t in refined.items()})

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
        rows = self.tests.ask(
            server_round - 1,
            asked,
            self._eval_arrays(),
            {LABELS: (0, MAX_EXAMPLES)},
            {QUERY: stage.number},
        )
        self.arrays = self._start
        total = sum(int(row[LABELS]) for row in rows.values())
        return {"labels": {"active_round": stage.number, "clients": len(rows), "asked": total}}

    def _begin_phase(self, server_round: int) -> dict[str, Any]:
        """Have clients without labels choose pseudo-labels, unless they have in this phase.

        Returns:
            The entry `pseudo_labels` of the round's line, if a phase begins.
        """
        stage, unlabelled = stage_of(self.config, server_round), self.workspace.partition.unlabelled
        if not (self.config.relabel_every and unlabelled):
            return {}
        asked = self.pseudo.waiting(stage.number, unlabelled & set(self.strategy.known.trainable))
        if asked:
            ranges, settings = count_ranges_of(self.pseudo.classes), {LABELLING: stage.number}
            # With the model of the round before, which a node has stored under its number.
            arrays = self._eval_arrays()
            rows = self.tests.ask(server_round - 1, asked, arrays, ranges, settings)
            faults = self.pseudo.add(rows, self.training_images)
            self.strategy.evaluation_faults.add(faults)
        return {"pseudo_labels": self.pseudo.line()} if stage.begins else {}

    def _sample(self, server_round: int) -> dict[int, Message]:
        """The training messages of a round, by client id."""
        settings = ConfigRecord({**self.exchange.settings(), **self.pseudo.settings()})
        with self.presence.only_present(self.strategy, server_round):
            messages = list(
                self.strategy.configure_train(server_round, self.arrays, settings, self.grid)
            )
        client_of_node = self.strategy.known.client_of_node
        return {client_of_node[m.metadata.dst_node_id]: m for m in messages}

    def _seconds(self, server_round: int, clients: Sequence[int]) -> dict[int, float]:
        """The simulated seconds of clients in a round; empty without a clock."""
        return self.presence.seconds(
            server_round, {c: self._steps(c, server_round) for c in clients}
        )

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
        remarks["privacy"] = self._privacy_spent(server_round)
        return line | {name: part for name, part in remarks.items() if part}

    def _privacy_spent(self, server_round: int) -> dict[str, float | None]:
        """What the noise of the clients has cost so far: epsilon of clients and of single images.

        Raises:
            UserError: there is noise, and its accountant is not installed.
        """
        privacy, spent = self.config.privacy, dict[str, float | None]()
        if privacy.noise:
            # A client pays for every round that it is asked for, and again if one is repeated.
            times = server_round + self.releases.repeated("clients")
            spent = {"epsilon": local_epsilon(privacy, times), "delta": privacy.delta}
        if privacy.image_noise:
            spent["image_epsilon"] = image_epsilon(
                privacy,
                self.config.training,
                self.releases.by_client("clients"),
                self.training_images,
                steps=self.takes_steps,
            )
            spent["delta"] = privacy.delta
        return spent

    def _images_in(self, client: int, server_round: int) -> int:
        """The number of images that a client trains on in a round."""
        if self.config.partition.sessions:
            return len(self.workspace.at(server_round).partition.train(client))
        if self.config.relabel_every and client in self.workspace.partition.unlabelled:
            return self.pseudo.images_of(client)
        images, per_round = self.training_images(client), self.config.partition.labels_per_round
        if not per_round or self.config.method.learns_without_labels:
            return images
        return min(images, stage_of(self.config, server_round).number * per_round)

    def _without_labels(self) -> dict[str, int]:
        """How many of the sampled clients have no labels, in a run in which such clients train."""
        unlabelled = self.workspace.partition.unlabelled
        if not (unlabelled and self.config.trains_without_labels):
            return {}
        return {"unlabelled": len(unlabelled & set(self.strategy.sampled))}

    def _send(self, messages: Sequence[Message]) -> tuple[list[Message], Traffic]:
        """Send messages and wait for replies, at most `federation.timeout_s` seconds."""
        timeout = self.config.federation.timeout_s
        replies = list(self.grid.send_and_receive(messages, timeout=timeout))
        return replies, self.grid.traffic

    # Evaluation

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
            rows = self.tests.ask(server_round, asked, self._eval_arrays(), ranges, settings)
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
        bad = attackers(
            self.config.seed, self.workspace.possible_attackers, self.config.attack.share
        )
        tested, *hits = BACKDOOR_COUNTS
        ranges: Ranges = {tested: (0, MAX_EXAMPLES), **dict.fromkeys(hits, (0, tested))}
        asked = [client for client in self.strategy.clients if client in bad]
        rows = self.tests.ask(server_round, asked, self._eval_arrays(), ranges, {BACKDOOR: True})
        return backdoor_part(rows)

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
        if score.precision is not None:
            part |= {"micro_f1": score.micro_f1, "macro_f1": score.macro_f1}
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
            row |= {tested: score.tested, correct: score.credit}
            if score.unanswered:
                row[NOT_FINITE] = 1

    def _eval_arrays(self) -> ArrayRecord:
        """The shared tensors that are evaluated, as they are sent."""
        return to_record(self.strategy.eval_tensors(to_arrays(self.arrays)))

    # Protocols

    def measure_round(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """What the evaluation protocols add to the line of an evaluated round.

        Args:
            line: the round's line in `metrics.jsonl` so far.

        Returns:
            The entry `protocols`, or nothing if no protocol measures single rounds.
        """
        return self.protocols.measure_round(self.shared, line)

    def ask_clients(self, server_round: int) -> None:
        """Have all clients measure for the protocols, while the grid has their private tensors."""
        if self.protocols.ask_clients:
            arrays, ranges = self._eval_arrays(), self.protocols.ranges
            rows = self.tests.ask(
                server_round, self.strategy.clients, arrays, ranges, {PROTOCOLS: True}
            )
            self.protocols.add_clients(rows)

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
        return self.protocols.measure(self.shared, rounds, summary)

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
            with self.presence.only_present(self.strategy, server_round):
                self.asked.update(self.strategy.sample(server_round))
