"""Who can be asked in a round, who answers it, and how long that takes in simulated time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from fedprompt.federation.clock import Clock, message_bytes
from fedprompt.federation.sampling import Clients
from fedprompt.federation.strategy import SharedPromptStrategy
from fedprompt.federation.trace import Trace
from fedprompt.workspace import Workspace

DROPPED_OUT = "dropped out, as conditions.dropout or conditions.trace has it"
LATE = "late: "
"""How the reason begins for which a simulated reply that misses the deadline does not count."""


class Presence:
    """The clients of a simulation that are reachable, drop out or are late.

    Args:
        workspace: the experiment's data and method.

    Attributes:
        trace: who takes part in which round.
        clock: how long clients take; None without simulated time.

    Raises:
        UserError: a file of `conditions` or `clock` cannot be read.
    """

    def __init__(self, workspace: Workspace) -> None:
        config, clients = workspace.config, workspace.num_clients
        self.trace = Trace(config.conditions, config.seed, clients)
        self.clock: Clock | None = None
        if config.clock.enabled:
            sizes = message_bytes(workspace.shared_shapes, workspace.extras_shapes)
            self.clock = Clock(config.clock, config.seed, clients, sizes)
        self._deadline_s = config.clock.deadline_s

    @property
    def digests(self) -> dict[str, str]:
        """Checksums of the files that were read, for `partition.json`."""
        files = {"trace": self.trace.digest, "devices": self.clock.digest if self.clock else ""}
        return {name: digest for name, digest in files.items() if digest}

    @contextmanager
    def only_present(self, strategy: SharedPromptStrategy, server_round: int) -> Iterator[None]:
        """Within it, the strategy knows who can be asked in a round; tests reach everyone.

        Args:
            strategy: the strategy that samples.
            server_round: the round, from 1.
        """
        known = strategy.known
        if not self.trace.trivial:
            present = self.trace.present(server_round, known.trainable)
            strategy.known = Clients(known.node_of_client, known.trainable, present)
        try:
            yield
        finally:
            strategy.known = known

    def seconds(self, server_round: int, steps: Mapping[int, int]) -> dict[int, float]:
        """The simulated seconds of clients in a round; empty without a clock.

        Args:
            server_round: the round, from 1.
            steps: the optimiser steps of each client.
        """
        if self.clock is None:
            return {}
        return {c: self.clock.seconds(server_round, c, n) for c, n in steps.items()}

    def absent(
        self, server_round: int, sampled: Sequence[int], times: Mapping[int, float]
    ) -> dict[int, str]:
        """Why sampled clients will not reply in time.

        They are known before they are asked, so nobody trains in vain: a client that is late has
        lost its work, and keeps its private tensors as they were.

        Args:
            server_round: the round.
            sampled: the clients that are asked to train.
            times: the result of `seconds`.

        Returns:
            The reasons by client id.
        """
        absent = {}
        for client in sampled:
            if self.trace.drops_out(server_round, client):
                absent[client] = DROPPED_OUT
            elif self.clock is not None and self.clock.is_late(times[client]):
                reason = f"{LATE}{times[client]:.3g} s, clock.deadline_s={self._deadline_s:g}"
                absent[client] = reason
        return absent
