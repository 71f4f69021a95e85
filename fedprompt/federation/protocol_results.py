"""What the evaluation protocols of a run measure in its rounds, on its clients and at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedprompt.evaluation.registry import Finished, open_protocols
from fedprompt.federation.scores import finite
from fedprompt.federation.screening import Row
from fedprompt.messages import Ranges
from fedprompt.methods.base import Tensors
from fedprompt.workspace import Workspace


class ProtocolResults:
    """The protocols of a run and what they have measured.

    Args:
        workspace: the server's own data, CLIP and method.

    Attributes:
        each: the protocols that the config asks for.
        references: by protocol and name, the shared tensors of the federations that it compares the
            run with; `fedprompt.experiment.run` trains them.

    Raises:
        UserError: a protocol's options are wrong.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.each = open_protocols(workspace.config)
        self.references: dict[str, dict[str, Tensors]] = {}
        self._rows: dict[int, Row] = {}

    def open(self) -> None:
        """Open the data of every protocol, so that a missing file is noticed before the training.

        Raises:
            UserError: a protocol's data set or file cannot be opened.
        """
        for protocol in self.each:
            protocol.open(self.workspace)

    def measure_round(self, shared: Tensors, line: Mapping[str, Any]) -> dict[str, Any]:
        """What the protocols add to the line of an evaluated round.

        Args:
            shared: the tensors of the global model.
            line: the round's line in `metrics.jsonl` so far.

        Returns:
            The entry `protocols`, or nothing if no protocol measures single rounds.
        """
        parts = {
            protocol.name: protocol.measure_round(self.workspace, shared, line)
            for protocol in self.each
        }
        parts = {name: part for name, part in parts.items() if part is not None}
        return {"protocols": parts} if parts else {}

    @property
    def ranges(self) -> Ranges:
        """The numbers that clients measure for the protocols, and their limits; may be empty."""
        ranges: dict[str, tuple[float, float | str]] = {}
        for protocol in self.each:
            if protocol.asks_clients:
                ranges |= _prefixed(protocol.name, protocol.client_numbers(self.workspace))
        return ranges

    @property
    def ask_clients(self) -> bool:
        """Whether clients measure something."""
        return any(protocol.asks_clients for protocol in self.each)

    def add_clients(self, rows: Mapping[int, Row]) -> None:
        """Add what clients have measured, checked against `ranges`."""
        self._rows.update(rows)

    def measure(
        self, shared: Tensors, rounds: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Results of the protocols at the end of a run.

        Args:
            shared: the tensors of the global model.
            rounds: all lines of rounds in `metrics.jsonl`.
            summary: the run's summary so far.

        Returns:
            What each protocol measures, as plain JSON by the protocol's name.
        """
        parts = {}
        for protocol in self.each:
            prefix = f"{protocol.name}."
            clients = {
                client: {n.removeprefix(prefix): v for n, v in row.items() if n.startswith(prefix)}
                for client, row in sorted(self._rows.items())
            }
            references = self.references.get(protocol.name, {})
            part = protocol.measure(
                Finished(self.workspace, shared, clients, rounds, summary, references)
            )
            if part is not None:
                parts[protocol.name] = finite(part)
        return parts


def _prefixed(protocol: str, ranges: Ranges) -> dict[str, tuple[float, float | str]]:
    """The ranges of a protocol's numbers under the names that clients give them in a reply."""
    return {
        f"{protocol}.{name}": (low, f"{protocol}.{high}" if isinstance(high, str) else high)
        for name, (low, high) in ranges.items()
    }
