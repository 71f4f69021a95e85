"""The base class of all our grids: a Flower `Grid` that counts the bytes of its last exchange.

Runs on the server. The grids of a simulation are in `fedprompt.simulation`; that of a deployment is
`fedprompt.deploy.node_grid.NodeGrid`.
"""

from __future__ import annotations

from collections.abc import Collection

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedprompt.messages import Run, Traffic

__all__ = ["CountingGrid", "Traffic"]


class CountingGrid(Grid):
    """A grid of one run that remembers the bytes of its last exchange in `traffic`.

    Subclasses implement the rest of Flower's `Grid`, and `send_and_receive` sets `traffic`.

    Args:
        run: Flower's description of the run.

    Attributes:
        traffic: the bytes of the last exchange.
        silent: clients that receive training messages and answer none. Only a simulation's grid
            heeds it; a deployment refuses the conditions that would set it.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.traffic = Traffic()
        self.silent: Collection[int] = ()

    def set_run(self, run: Run) -> None:
        """Replace Flower's description of the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """Flower's description of the run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message to one node, as Flower's `Grid` defines it.

        Args:
            content: the records of the message.
            message_type: one of Flower's `MessageType`.
            dst_node_id: the node that the message is for.
            group_id: the group that the message belongs to; for our messages it is the round.
            ttl: seconds until the message expires; None for Flower's default.
        """
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)
