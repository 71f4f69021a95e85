"""A Ray actor that answers blocks: one process, one frozen CLIP.

Ray imports this module in a bare process. What a library reads when it is loaded is therefore set
here first, and the libraries are imported afterwards, inside the methods.
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
    """Where a worker runs: process id, what it shares memory on, and how much is free there."""

    pid: int
    memory: str
    free_bytes: float


class Answer(NamedTuple):
    """Replies of a block, its changed private tensors, and how long the worker took."""

    replies: list[bytes]
    changed: Packed
    seconds: float


class Worker:
    """The actor. It is created in no time; `open` then loads CLIP, features and data."""

    def __init__(self, needs_timm: bool) -> None:
        set_defaults()
        if not needs_timm:
            # open_clip works without timm where timm cannot be imported. Pretending so saves
            # about 25 MB per worker. It must happen before Ray unpickles the arguments of `open`,
            # which imports open_clip.
            sys.modules.setdefault("timm", None)  # type: ignore[arg-type]
        self._workspace: Workspace

    def placed(self) -> bool:
        """Answers once Ray has found a place for the process."""
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
        """Train or test one block."""
        from fedprompt.simulation.block_grid import run_block

        start = time.perf_counter()
        replies, changed = run_block(self._workspace, block, unpack(private), answer)
        return Answer(replies, pack(changed), time.perf_counter() - start)


def pack(tensors: Mapping[int, Tensors]) -> Packed:
    """Few large arrays instead of many small tensors, which are slow to send one by one."""
    import numpy as np

    clients = list(tensors)
    names = list(tensors[clients[0]]) if clients else []
    return clients, {n: np.stack([tensors[c][n].numpy() for c in clients]) for n in names}


def unpack(packed: Packed) -> dict[int, Tensors]:
    """What `pack` was given; every tensor is a copy, so that nothing stays in Ray's memory."""
    import torch

    clients, arrays = packed
    return {
        client: {name: torch.from_numpy(rows[k, ...].copy()) for name, rows in arrays.items()}
        for k, client in enumerate(clients)
    }
