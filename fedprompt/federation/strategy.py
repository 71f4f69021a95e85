"""The contract of all server strategies.

A strategy is a subclass of `SharedPromptStrategy` in a file of its own in `strategies/`, and
usually implements a single function, `aggregate`. It runs on the server, where `Federation` calls
it in every round.

The base class is a Flower `Strategy` that samples the clients, creates their messages, and checks
replies before they count. Two properties of Flower make this necessary. Node ids are random and
replies arrive in no fixed order, so results would differ from run to run. And no strategy of
Flower's checks the replies: one NaN would spread to all clients.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedprompt.config.fields import option
from fedprompt.federation.sampling import Clients, draw_clients
from fedprompt.federation.screening import (
    TEST_COUNTS,
    Limits,
    count_ranges,
    screen_evaluations,
    screen_replies,
)
from fedprompt.messages import (
    ARRAYS,
    CONFIG,
    EXTRAS,
    Arrays,
    Exchanged,
    Update,
    to_arrays,
    to_record,
)
from fedprompt.privacy.releases import Releases
from fedprompt.runtime.faults import Faults

__all__ = ["Arrays", "SharedPromptStrategy", "StrategyConfig", "Update"]

log = logging.getLogger("fedprompt.strategy")


@dataclass(frozen=True)
class StrategyConfig:
    """The options that every strategy has."""

    name: str = option("fedavg", "strategy name")
    max_norm: float = option(1e4, "L2 norm above which a reply's tensors are refused", gt=0)
    max_examples_ratio: float = option(
        1000.0,
        "times the median number of images above which a reply is refused; without effect in "
        "strategies that weigh all clients equally",
        ge=1,
    )


class SharedPromptStrategy(Strategy):
    """Server strategy on shared tensors by name; it knows no CLIP, data or private tensors.

    A subclass must define `name`, `Config` and `aggregate`. It may override `client_extras`,
    `client_shared`, `before_exchange`, `eval_tensors`, `eval_extras`, `metrics`, `forget_round`,
    `sample`, `state` with `load_state`, `changed_client_states` with `load_client_state` and
    `common_state`, `weights_by_examples`, and `__init__` in order to check `shapes`. In every round
    the hooks are called in this order:

    1. `sample`, `before_exchange`, then `client_shared` and `client_extras` for each sampled
       client. The last three are also called for the clients that are asked to test a model.
    2. `aggregate`, if enough valid replies came; `forget_round` otherwise.
    3. `metrics`, also if nothing was aggregated.
    4. `eval_tensors` and `eval_extras`, as often as the model is evaluated.
    5. `common_state` and `changed_client_states`, if a checkpoint is written. A resumed run calls
       `load_state` once, then `load_client_state` for each client, before step 1.

    Args:
        config: the strategy's own options, an instance of `Config`.
        shapes: shape of every shared tensor by name; all tensors are float32.
        seed: seed of the run; with the round it determines who takes part.
        fraction: share of the trainable clients that train in a round, in (0, 1]; at least one.
        min_replies: smallest number of valid replies for a round to change the shared tensors.
        extras: initial values of the tensors that clients receive beside the shared ones, if the
            method declares any.
        rounds: number of rounds of the whole run.

    Attributes:
        shared: shared tensors that the clients of the present round were sent.
        sampled: ids of the clients that were asked to train in the present round, ascending.
        rejected: why clients did not count in the last round, by client id.
        releases: the run's record of what has been released with noise.
        faults: logs why the training of clients did not count.
        evaluation_faults: logs why evaluations of clients did not count.

    Raises:
        UserError: the strategy cannot work with these tensors.
    """

    name: ClassVar[str]
    """The strategy's name; it is also the name of its module and of its config file."""
    Config: ClassVar[type[Any]] = StrategyConfig
    """Frozen dataclass of the strategy's options, derived from `StrategyConfig`."""
    linear_in_updates: ClassVar[bool] = False
    """Whether `aggregate` gives the same result on one update that is the mean of all.

    The mean is weighted as `weights_by_examples` says. Only such strategies run under secure
    aggregation. The value is not inherited: a subclass that looks at single updates must not claim
    it by accident.
    """
    secret_state: ClassVar[bool] = False
    """Whether what `state` returns must be kept secret, such as the key that noise comes from.

    Only the owner of a checkpoint can then read it.
    """
    remembers_clients: ClassVar[bool] = False
    """Whether it keeps something about single clients from one round to the next."""
    steps_without_replies: ClassVar[bool] = False
    """Whether `aggregate` is called in every round, even with no updates, whatever `min_replies`.

    A strategy with differential privacy needs this: if a round counted only with enough replies,
    the shared tensors would show whether a single client had replied.
    """

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
        # No client is known before `set_nodes` has been called.
        self.known = Clients({})
        self.shared: Arrays = {}
        self.sampled: list[int] = []
        self.rejected: dict[int, str] = {}
        self.releases = Releases()
        self.faults = Faults(log, "reply dropped")
        self.evaluation_faults = Faults(log, "evaluation dropped")
        self._in_flight: list[Message] = []

    # What a strategy defines

    @abstractmethod
    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """New shared tensors from the last ones and the clients' updates.

        The result must not depend on the order in which replies came, and neither argument may be
        changed.

        Args:
            server_round: the round, from 1.
            shared: the tensors that the clients were sent, float32, in the shapes of `self.shapes`.
            updates: at least one checked update (none is possible with `steps_without_replies`),
                sorted by client id. Their arrays have the names and shapes of `shared`; they are
                float32, or float64 for a mean of several clients.

        Returns:
            Tensors with the names and shapes of `shared`; they are converted to float32.
        """

    @classmethod
    def needs_only_the_mean(cls) -> bool:
        """Whether the class itself declares `linear_in_updates`."""
        # `vars` ignores base classes, so that a subclass has to declare it again.
        return bool(vars(cls).get("linear_in_updates", False))

    @classmethod
    def works_without_rounds(cls) -> bool:
        """Whether updates may be of different rounds, as in an asynchronous run.

        They may not if the strategy chooses the clients of a round, sends single clients something
        of its own, keeps something about them, or accounts for the privacy of a round.
        """
        by_round = "sample", "before_exchange", "client_extras", "client_shared"
        plain = all(getattr(cls, n) is getattr(SharedPromptStrategy, n) for n in by_round)
        return plain and not (
            cls.remembers_clients or cls.steps_without_replies or cls.secret_state
        )

    @property
    def weights_by_examples(self) -> bool:
        """Whether clients are weighed by their images, or all equally.

        It must be the same in all rounds. Where it is False, what a client claims about its images
        has no effect, on its own weight or on whether others count. `linear_in_updates` means the
        mean with these weights.
        """
        return True

    def before_exchange(self, clients: Sequence[int]) -> None:
        """Prepare what `client_extras` and `client_shared` return, for all clients together.

        Args:
            clients: ids of the clients that are sent messages.
        """

    def client_extras(self, server_round: int, client: int) -> Arrays:
        """Tensors that a single client is sent beside the shared ones.

        Args:
            server_round: the round in which they are sent.
            client: the client's id.

        Returns:
            Tensors with the names, shapes and types of `self.extras`, which are the default.
        """
        return self.extras

    def client_shared(self, client: int) -> Arrays | None:
        """Tensors that a client is sent in place of the common shared tensors.

        Args:
            client: the client's id.

        Returns:
            Tensors with the names and shapes of `self.shapes`, float32, or None to send the common
            ones.
        """
        return None

    def metrics(self) -> dict[str, Any]:
        """Additional entries for the round's line in `metrics.jsonl`, as plain JSON."""
        return {}

    def forget_round(self) -> None:
        """Forget what `metrics` says about the last step; called in a round without a step.

        Otherwise the round's line would repeat it, and a resumed run, which does not know it, would
        write another line.
        """

    def eval_tensors(self, shared: Arrays) -> Arrays:
        """The tensors that are evaluated, and saved at the end of the run.

        Args:
            shared: the present shared tensors, from which the next round trains.

        Returns:
            Tensors with the names and shapes of `shared`, float32; by default `shared` itself.
        """
        return shared

    def eval_extras(self) -> Arrays:
        """Extras that belong to the global model, which is evaluated and saved with them.

        Returns:
            Some of `self.extras` with values, of the same names and shapes, float32; none by
            default.
        """
        return {}

    def state(self) -> Arrays:
        """Everything that a resumed run needs besides the shared tensors.

        Returns:
            Arrays by name, of any shape and numeric type. They are written to the checkpoint
            unchanged; a resumed run must continue bit for bit.
        """
        return {}

    def load_state(self, state: Arrays) -> None:
        """Restore what `state` returned, which may be `{}`."""

    # A strategy that knows something about each client would write all of it with every
    # checkpoint. With these three, a checkpoint costs what has changed.

    def common_state(self) -> Arrays:
        """The part of `state` that belongs to no single client; by default all of it."""
        return self.state()

    def changed_client_states(self) -> Iterator[tuple[int, Arrays]]:
        """What is known about single clients, of those for whom it has changed.

        Yields:
            Since the last call, the id of each such client and arrays by name, with the same names
            in every call for the client. They are written to a log beside the checkpoint.
        """
        return iter(())

    def load_client_state(self, client: int, arrays: Arrays) -> None:
        """Restore what `changed_client_states` yielded last for a client."""

    def sample(self, server_round: int) -> list[int]:
        """Ids of the clients that train in a round, ascending.

        An override must choose from `self.known.present` and may depend on `self.seed` and the
        round only, so that a resumed run draws the same clients.
        """
        return draw_clients(
            self.known, seed=self.seed, server_round=server_round, fraction=self.fraction
        )

    # What a federation calls

    def set_nodes(
        self, node_of_client: Mapping[int, int], trainable: Collection[int] | None = None
    ) -> None:
        """Set the clients that can be reached; called again when nodes join or leave.

        Args:
            node_of_client: Flower's node id of every client.
            trainable: ids of the clients that may be asked to train; None for all.
        """
        self.known = Clients(node_of_client, trainable)

    @property
    def clients(self) -> list[int]:
        """Ids of all known clients, ascending."""
        return list(self.known.ids)

    @property
    def participants(self) -> list[int]:
        """Ids of the clients whose training counted in the last round, ascending."""
        return [c for c in self.sampled if c not in self.rejected]

    def screen(
        self, server_round: int, asked: Sequence[Message], replies: Iterable[Message]
    ) -> Exchanged:
        """Check the training replies of the present round, see `screening.screen_replies`."""
        # The rule compares clients, so one client's claim decides about others. Where claims have
        # no weight there is nothing to gain from them, and only the harm would be left.
        ratio = self.config.max_examples_ratio if self.weights_by_examples else math.inf
        fewest = 0 if self.steps_without_replies else self.min_replies
        limits = Limits(self.shapes, self.config.max_norm, ratio, fewest)
        return screen_replies(asked, replies, self.known.client_of_node, limits)

    def finish_round(self, server_round: int, exchanged: Exchanged) -> ArrayRecord | None:
        """Aggregate what an exchange returned.

        Args:
            server_round: the round, from 1.
            exchanged: result of the round's exchange.

        Returns:
            The new shared tensors, or None if there is nothing to aggregate.
        """
        self.rejected = {**exchanged.dropped, **exchanged.absent}
        # A simulated absence is no fault.
        self.faults.add(exchanged.dropped)
        if exchanged.void:
            self.faults.add_round(server_round, exchanged.void)
        elif not exchanged.updates:
            self.faults.add_round(server_round, "no valid update; the strategy steps without one")
        if not exchanged.updates and not self.steps_without_replies:
            self.forget_round()
            return None
        new = self.aggregate(server_round, self.shared, exchanged.updates)
        # Strategies may compute in float64, but clients accept float32 only.
        self.shared = {k: np.asarray(v, dtype=np.float32) for k, v in new.items()}
        return to_record(self.shared)

    # Flower's hooks

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One training message per sampled client, in the order of client ids.

        Args:
            server_round: the round, from 1.
            arrays: the present shared tensors.
            config: settings that every message contains.
            grid: not used; the clients come from `set_nodes`.
        """
        # Kept for `aggregate`, which needs the tensors that the clients started from.
        self.shared = to_arrays(arrays)
        self.sampled = self.sample(server_round)
        return self.training_messages(server_round, self.sampled, arrays, config)

    def training_messages(
        self, server_round: int, clients: Sequence[int], arrays: ArrayRecord, config: ConfigRecord
    ) -> list[Message]:
        """Training messages to given clients, in their order; see `configure_train`.

        Args:
            server_round: the round, from 1.
            clients: client ids.
            arrays: the shared tensors that they train from.
            config: settings that every message contains.
        """
        return self._messages(clients, MessageType.TRAIN, server_round, arrays, config)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check, sort and aggregate the replies, as a plain Flower `Strategy.start` expects it.

        Args:
            server_round: the round, from 1.
            replies: what the clients sent, in any order.

        Returns:
            The new shared tensors, or None if too few replies are valid, and the round's counts and
            mean losses.
        """
        exchanged = self.screen(server_round, self._in_flight, replies)
        arrays = self.finish_round(server_round, exchanged)
        counts = {
            "sampled": len(self.sampled),
            "accepted": exchanged.accepted,
            "rejected": len(exchanged.dropped),
        }
        return arrays, MetricRecord({**counts, **exchanged.losses})

    def configure_evaluate(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
        clients: Sequence[int] | None = None,
    ) -> Iterable[Message]:
        """One evaluation message per client.

        Args:
            server_round: the round; 0 before any training.
            arrays: shared tensors to evaluate.
            config: settings that every message contains.
            grid: not used; the clients come from `set_nodes`.
            clients: ids of the clients to ask; None for every known client.
        """
        asked = self.clients if clients is None else clients
        return self._messages(asked, MessageType.EVALUATE, server_round, arrays, config)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """The clients' results on their own images as lists, sorted by the ids in `client-ids`."""
        rows = screen_evaluations(
            self._in_flight,
            replies,
            self.known.client_of_node,
            count_ranges(TEST_COUNTS),
            self.evaluation_faults,
        )
        if not rows:
            return None
        columns: dict[str, Any] = {n: [row[n] for row in rows.values()] for n in TEST_COUNTS}
        return MetricRecord({"client-ids": list(rows), **columns})

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
        self.before_exchange(clients)
        # `server-round` is the key that Flower's own strategies use.
        settings = ConfigRecord({**config, "server-round": server_round})
        # Most clients are sent this very object, which a simulation then serialises once.
        common = RecordDict({ARRAYS: arrays, CONFIG: settings})
        # Flower passes the replies alone to `aggregate_train` and `aggregate_evaluate`, and whose a
        # reply is follows from the message that it answers.
        self._in_flight = [
            Message(
                content=self._content(common, server_round, client),
                dst_node_id=self.known.node_of_client[client],
                message_type=message_type,
                group_id=str(server_round),
            )
            for client in clients
        ]
        return self._in_flight

    def _content(self, common: RecordDict, server_round: int, client: int) -> RecordDict:
        """The common content with what this client is sent instead of it or beside it."""
        shared = self.client_shared(client)
        extras = self.client_extras(server_round, client)
        if shared is not None:
            common = RecordDict({**common, ARRAYS: to_record(shared)})
        return RecordDict({**common, EXTRAS: to_record(extras)}) if extras else common
