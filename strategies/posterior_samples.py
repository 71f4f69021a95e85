"""FedAvg, and the shared tensors with which each cycle of rounds ended are kept as samples.

For methods that sample from a posterior in cycles (ReBaPL): the method declares in its extras
`samples.<name>` (S, ...) for the shared tensor `<name>`, and `samples.known` (S,), which is 1 if a
row is a sample. Row c is what cycle c ended with; the last of the S + 1 cycles needs no row,
because its sample is the present state. The rows of finished cycles are sent to clients, and are
evaluated and saved with the global model. The set is bounded by the number of cycles. Uploads are
as in FedAvg; a message to a client is S + 1 times as large.

If no round of a cycle could be aggregated, its row stays unknown. The strategy is ours: the paper
is not federated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedprompt.config.cycles import place_of
from fedprompt.config.fields import option
from fedprompt.federation.screening import Update
from fedprompt.messages import Arrays

from .fedavg import FedAvg, FedAvgConfig
from .parts.required import require_extra

SAMPLES = "samples."
"""What precedes the names of the samples in the extras."""
KNOWN = "samples.known"
ROUND = "round"
"""Name in the state: the last round that was aggregated, 0 before the first."""


@dataclass(frozen=True)
class PosteriorSamplesConfig(FedAvgConfig):
    """The options of FedAvg; the method determines the number of cycles."""

    name: str = option("posterior_samples", "strategy name")


class PosteriorSamples(FedAvg):
    """FedAvg that keeps one sample per cycle.

    Raises:
        UserError: the method declares no samples.
    """

    name = "posterior_samples"
    Config = PosteriorSamplesConfig
    linear_in_updates = True

    def __init__(
        self,
        config: Any,
        *,
        shapes: Mapping[str, tuple[int, ...]],
        extras: Arrays | None = None,
        **rest: Any,
    ) -> None:
        needed = "that samples in cycles, e.g. rebapl"
        require_extra(self.name, KNOWN, extras, shapes, method=needed)
        super().__init__(config, shapes=shapes, extras=extras, **rest)
        self.rows = {n: a.copy() for n, a in self.extras.items() if n.startswith(SAMPLES)}
        self.samples = len(self.rows[KNOWN]) if self.rows else 0
        self.last_round = 0

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """FedAvg's mean; it is the sample of its cycle until a later round of the cycle."""
        new = super().aggregate(server_round, shared, updates)
        self.last_round = server_round
        cycle = self._cycle(server_round)
        if cycle < self.samples:
            self.rows[KNOWN][cycle] = 1
            for name, values in new.items():
                if SAMPLES + name in self.rows:
                    self.rows[SAMPLES + name][cycle] = values
        return new

    def client_extras(self, server_round: int, client: int) -> Arrays:
        """The samples of the cycles before that of the round."""
        return {**self.extras, **self._finished(self._cycle(server_round))}

    def eval_extras(self) -> Arrays:
        """The samples of the cycles before that of the last aggregated round."""
        return self._finished(self._cycle(self.last_round)) if self.last_round else {}

    def state(self) -> Arrays:
        """The samples, also of the present cycle, and the last aggregated round."""
        return {**self.rows, ROUND: np.array([self.last_round], dtype=np.int64)}

    def load_state(self, state: Arrays) -> None:
        """Restore what `state` has returned."""
        if state:
            self.rows = {n: state[n].copy() for n in self.rows}
            self.last_round = int(state[ROUND][0])

    def _cycle(self, server_round: int) -> int:
        return place_of(server_round, self.rounds, self.samples + 1).cycle

    def _finished(self, cycle: int) -> Arrays:
        """The rows before a cycle; the others are zeros and not known."""
        before = np.arange(self.samples) < cycle
        return {
            n: np.where(before.reshape(-1, *[1] * (a.ndim - 1)), a, np.float32(0))
            for n, a in self.rows.items()
        }
