"""The state of a federation after a round, from which a run continues bit for bit.

`Federation.checkpoint` creates it on the server, and the run folder writes it to disk. Clients'
private tensors are not part of it; only their digest is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the rounds after `server_round` depend on.

    Attributes:
        server_round: the last complete round; 0 before any training.
        shared: shared tensors by name, float32.
        strategy: state of the strategy, as `SharedPromptStrategy.common_state` returns it.
        totals: `bytes_up`, `bytes_down` and `rejected` since the run began.
        trained: the training part of the line of `server_round` in `metrics.jsonl` and its seconds,
            as JSON, while its test of everyone goes on; "" once the round is complete.
        flight: in an asynchronous run, who trains from which shared tensors at present; else empty.
        secret: whether the state must be kept secret; only the owner can read the file then.
        clients: digest of what the strategy knows about single clients, which is saved beside the
            checkpoint; "" if that is nothing.
        private: digest of the private tensors that are saved beside the checkpoint; "" if none are.
    """

    server_round: int
    shared: dict[str, Tensor]
    strategy: dict[str, Tensor]
    totals: dict[str, int]
    private: str = ""
    clients: str = ""
    trained: str = ""
    secret: bool = False
    flight: dict[str, Tensor] = field(default_factory=dict)
