"""Displays that end a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedprompt.experiment.display import QuietDisplay


class StopAfter(QuietDisplay):
    """Interrupts a run when a round is recorded."""

    def __init__(self, server_round: int) -> None:
        self.last = server_round

    def round(self, line: Mapping[str, Any], eta_s: float) -> None:
        """Stop after this round."""
        if line["round"] == self.last:
            raise KeyboardInterrupt
