"""A Ray actor that answers blocks: one process, one frozen CLIP.

Ray imports this module in a new process. Environment variables that a library reads when it is
loaded are therefore set here first, and the libraries are imported later, inside the methods.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fedprompt.runtime import set_defaults

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedprompt.config.schema import Config
    from fedprompt.messages import Parcel
    from fedprompt.methods.base import Tensors
    from fedprompt.simulation.block_grid import Handler, Opener
    from fedprompt.workspace import Workspace

Packed = tuple[list[int], dict[str, "NDArray[Any]"]]
"""Tensors of some clients: their ids, and by name one array with a leading client axis."""


class Place(NamedTuple):
    """Where a worker runs.

    Attributes:
        pid: its process id.
        memory: names the machine or GPU whose memory it shares with other workers.
        free_bytes: free bytes there.
    """

    pid: int
    memory: str
    free_bytes: float


class Answer(NamedTuple):
    """Replies of a block, the private tensors that it changed, and the worker's seconds."""

    replies: list[bytes]
    changed: Packed
    seconds: float


class Worker:
    """The actor. Creating it is cheap; `open` then loads CLIP, features and data.

    Args:
        needs_timm: whether the backbone needs timm.
    """

    def __init__(self, needs_timm: bool) -> None:
        set_defaults()
        if not needs_timm:
            # open_clip works without timm where timm cannot be imported. Pretending so saves
            # about 25 MB per worker. It must happen before Ray unpickles the arguments of `open`,
            # which imports open_clip.
            sys.modules.setdefault("timm", None)  # type: ignore[arg-type]
        self._workspace: Workspace

    def placed(self) -> bool:
        """Return as soon as Ray has found room for the process."""
        return True

    def open(self, config: Config, opener: Opener) -> Place:
        """Open this worker's workspace; weights and features are mapped from files, not sent.

        Args:
            config: the experiment.
            opener: opens the workspace of a config. Ray pickles it by reference.

        Returns:
            Where the worker runs and how much memory is left there.

        Raises:
            UserError: what `opener` raises.
        """
        import ray

        from fedprompt.messages import become_server
        from fedprompt.runtime import use_threads
        from fedprompt.simulation.blocks import free_memory

        use_threads(config.simulation, worker=True)
        become_server()
        self._workspace = opener(config)
        device = self._workspace.clip.device
        node = ray.get_runtime_context().get_node_id()
        return Place(os.getpid(), f"{node} {ray.get_gpu_ids() or 'cpu'}", free_memory(device))

    def use(self, method_config: Any) -> bool:
        """Change to the method of `method_config`; CLIP, features and data stay."""
        self._workspace = self._workspace.with_method(method_config)
        return True

    def run(self, block: Sequence[Parcel], private: Packed, answer: Handler) -> Answer:
        """Answer one block.

        Args:
            block: the block's messages as bytes.
            private: private tensors of its clients, as `pack` makes them.
            answer: answers the messages; pickled by reference.
        """
        from fedprompt.simulation.block_grid import run_block

        start = time.perf_counter()
        replies, changed = run_block(self._workspace, block, unpack(private), answer)
        return Answer(replies, pack(changed), time.perf_counter() - start)


def pack(tensors: Mapping[int, Tensors]) -> Packed:
    """Tensors of several clients as few large arrays; Ray is slow with many small objects."""
    import numpy as np

    clients = list(tensors)
    names = list(tensors[clients[0]]) if clients else []
    return clients, {n: np.stack([tensors[c][n].numpy() for c in clients]) for n in names}


def unpack(packed: Packed) -> dict[int, Tensors]:
    """The tensors that `pack` was given, copied so that no array of Ray's store stays in use."""
    import torch

    clients, arrays = packed
    return {
        client: {name: torch.from_numpy(rows[k, ...].copy()) for name, rows in arrays.items()}
        for k, client in enumerate(clients)
    }
