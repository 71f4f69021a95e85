"""Flower's `Grid` with the bytes of the last exchange counted: what a federation talks to."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run


@dataclass
class Traffic:
    """Bytes of the last exchange: `down` from the server, `up` to it."""

    down: int = 0
    up: int = 0


class CountingGrid(Grid):
    """Common part of all our grids: one run, and the bytes of the last exchange."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.traffic = Traffic()

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to one node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)
