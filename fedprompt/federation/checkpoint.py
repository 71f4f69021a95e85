"""The state of a federation after a round, from which a run continues bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Checkpoint:
    """The state behind `server_round`, from which a run goes on bit for bit.

    `private` is the seal of the private tensors that lie beside it, "" where there are none.
    """

    server_round: int
    shared: dict[str, Tensor]
    strategy: dict[str, Tensor]
    totals: dict[str, int]
    private: str = ""
