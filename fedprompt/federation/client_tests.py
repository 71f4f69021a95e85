"""Exchanges in which clients evaluate a model on their own images, a limited number at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message

from fedprompt.federation.client_app import QUERY
from fedprompt.federation.grid import CountingGrid
from fedprompt.federation.pseudo_labelling import LABELLING
from fedprompt.federation.screening import Row, screen_evaluations
from fedprompt.federation.strategy import SharedPromptStrategy
from fedprompt.files.tensors import array_checksum
from fedprompt.messages import Ranges, Traffic, to_arrays
from fedprompt.workspace import Workspace

CLIENTS_AT_ONCE = 1000
"""The most clients evaluated in one exchange; their test images are in memory at the same time."""
MESSAGE_BYTES_AT_ONCE = 1 << 30
"""The most bytes of messages in one exchange of an evaluation. Some methods send a client the
prompts of several others, and a thousand such messages do not fit into the memory of a machine."""

Send = Callable[[Sequence[Message]], tuple[list[Message], Traffic]]
"""Sends messages and waits for the replies."""


class TestRecord(Protocol):
    """Where the results of a test of many clients are recorded while it goes on."""

    def find(self, test: str, clients: Sequence[int]) -> dict[int, Row] | None:
        """The results of an exchange with these clients, or None if it has to be asked."""

    def add(self, test: str, clients: Sequence[int], rows: Mapping[int, Row]) -> None:
        """Record the results of an exchange."""


class ClientTests:
    """Asks clients to evaluate.

    Args:
        workspace: the server's own data and method.
        strategy: writes the messages.
        grid: through which they are sent.
        send: sends them and waits.

    Attributes:
        record: records the results of a test of many clients while it goes on; None for no record.
    """

    def __init__(
        self,
        workspace: Workspace,
        strategy: SharedPromptStrategy,
        grid: CountingGrid,
        send: Send,
    ) -> None:
        self._workspace, self._strategy, self._grid, self._send = workspace, strategy, grid, send
        self.record: TestRecord | None = None

    @property
    def in_parts(self) -> bool:
        """Whether a test of everyone takes several exchanges."""
        return len(self._strategy.clients) > self.clients_at_once

    @cached_property
    def clients_at_once(self) -> int:
        """Clients evaluated in one exchange.

        It follows from the tensors' shapes, so a resumed run asks the same clients together.
        """
        workspace = self._workspace
        shapes = [*workspace.shared_shapes.values(), *workspace.extras_shapes.values()]
        message = 4 * sum(map(math.prod, shapes))  # all are float32
        return min(CLIENTS_AT_ONCE, max(1, MESSAGE_BYTES_AT_ONCE // max(1, message)))

    def ask(
        self,
        server_round: int,
        clients: Sequence[int],
        arrays: ArrayRecord,
        ranges: Ranges,
        settings: Mapping[str, bool | int] = MappingProxyType({}),
    ) -> dict[int, Row]:
        """Evaluate on clients, at most `clients_at_once` in one exchange.

        Args:
            server_round: the round that the messages belong to.
            clients: ids of the clients to ask.
            arrays: shared tensors to evaluate.
            ranges: the metrics that the clients report, and within which limits.
            settings: entries that are added to the settings in the messages.

        Returns:
            The checked metrics by client id.
        """
        at_once, strategy = self.clients_at_once, self._strategy
        # A query changes what clients know, so a resumed run must ask again.
        repeatable = not {QUERY, LABELLING} & set(settings)
        record = self.record if len(clients) > at_once and repeatable else None
        found: dict[int, Row] = {}
        test = ""
        if record:
            tensors = array_checksum(to_arrays(arrays))[:16]
            test = f"{server_round} {sorted(settings)} {tensors}"
        for first in range(0, len(clients), at_once):
            part = clients[first : first + at_once]
            rows = record.find(test, part) if record else None
            if rows is None:
                asked = list(
                    strategy.configure_evaluate(
                        server_round, arrays, ConfigRecord({**settings}), self._grid, clients=part
                    )
                )
                replies, _ = self._send(asked)
                known, faults = strategy.known.client_of_node, strategy.evaluation_faults
                rows = screen_evaluations(asked, replies, known, ranges, faults)
                if record:
                    record.add(test, part, rows)
            found |= rows
        return found
