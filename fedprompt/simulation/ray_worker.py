"""The Ray actor that answers blocks of clients: one process, one frozen CLIP.

It runs on the clients' side of a simulation. Ray imports this module in a new process. Environment
variables that a library reads when it is imported must therefore be set here first, and the
libraries are imported later, inside the methods.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fedprompt.runtime import OPTIONAL_LIBRARIES, set_defaults

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedprompt.config.schema import Config, TrainingConfig
    from fedprompt.messages import Parcel
    from fedprompt.methods.base import Tensors
    from fedprompt.simulation.answer_block import Handler
    from fedprompt.simulation.block_grid import Opener
    from fedprompt.workspace import Workspace

Packed = tuple[list[int], dict[str, "NDArray[Any] | list[NDArray[Any]]"]]
"""Tensors of several clients: the clients' ids, and by name one array with a client axis, or a list
of arrays where they differ in length."""


class Place(NamedTuple):
    """Where a worker runs.

    Attributes:
        pid: its process id.
        memory: a name of the memory, of a machine or GPU, that it shares with other workers.
        free_bytes: the number of free bytes in this memory.
    """

    pid: int
    memory: str
    free_bytes: float


class Answer(NamedTuple):
    """What a worker returns for a block.

    Attributes:
        replies: the replies as bytes, in the order of the block.
        changed: the private tensors that training has changed.
        seconds: the time that the worker took, for the planner.
        fitted: as in `answer_block.Answered`.
    """

    replies: list[bytes]
    changed: Packed
    seconds: float
    fitted: int | None = None


class Worker:
    """The actor class. Creating an actor is cheap; `open` then loads CLIP, features and data.

    Args:
        libraries: what the backbone needs of `runtime.OPTIONAL_LIBRARIES`.
    """

    def __init__(self, libraries: frozenset[str]) -> None:
        set_defaults()
        for name in OPTIONAL_LIBRARIES - libraries:
            # open_clip also works where these are not installed. A None in `sys.modules` makes the
            # import fail, which saves memory and time per worker. It must happen before Ray
            # unpickles the arguments of `open`, because that imports open_clip.
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]
        self._workspace: Workspace

    def placed(self) -> bool:
        """Report that Ray has found room for the process and created it."""
        return True

    def open(self, config: Config, opener: Opener) -> Place:
        """Open this worker's workspace.

        Weights and features are mapped from files on this machine and not sent through Ray.

        Args:
            config: the experiment.
            opener: the function that opens the workspace of a config.

        Returns:
            Where the worker runs and how much memory is left there.

        Raises:
            UserError: `opener` raised it.
        """
        import ray

        from fedprompt.backbone.devices import order_sums
        from fedprompt.messages import become_server
        from fedprompt.runtime import use_threads
        from fedprompt.runtime.device_memory import free_memory

        use_threads(config.simulation, worker=True)
        order_sums(config.backbone)
        become_server()
        self._workspace = opener(config)
        device = self._workspace.clip.device
        # Workers with the same GPUs, or on the CPUs of the same node, share their memory.
        node = ray.get_runtime_context().get_node_id()
        return Place(os.getpid(), f"{node} {ray.get_gpu_ids() or 'cpu'}", free_memory(device))

    def use(self, method_config: Any, training: TrainingConfig) -> bool:
        """Change to another method and keep CLIP, features and data.

        Args:
            method_config: the `method` section.
            training: the `training` section.
        """
        self._workspace = self._workspace.with_method(method_config, training)
        return True

    def run(
        self, block: Sequence[Parcel], private: Packed, answer: Handler, at_once: int | None
    ) -> Answer:
        """Answer one block.

        Args:
            block: the block's messages as bytes.
            private: private tensors of its clients, as `pack` returns them.
            answer: the function that answers the messages. Ray pickles it by reference.
            at_once: as in `run_block`.

        Returns:
            The replies, the changed private tensors and the time. A client that fails has an error
            reply.

        Raises:
            DeviceFault: the device has failed; this process cannot use it any more.
        """
        from fedprompt.simulation.answer_block import run_block

        start = time.perf_counter()
        answered = run_block(self._workspace, block, unpack(private), answer, at_once=at_once)
        seconds = time.perf_counter() - start
        return Answer(answered.replies, pack(answered.changed), seconds, answered.fitted)


def pack(tensors: Mapping[int, Tensors]) -> Packed:
    """Stack the tensors of several clients, since Ray is slow with many small objects.

    Args:
        tensors: by client id, tensors by name; all clients have the same names.

    Returns:
        The clients' ids and one array per name, or a list of arrays if their shapes differ.
    """
    import numpy as np

    clients = list(tensors)
    packed: dict[str, NDArray[Any] | list[NDArray[Any]]] = {}
    for name in tensors[clients[0]] if clients else ():
        rows = [tensors[client][name].numpy() for client in clients]
        packed[name] = np.stack(rows) if len({row.shape for row in rows}) == 1 else rows
    return clients, packed


def unpack(packed: Packed) -> dict[int, Tensors]:
    """Restore the tensors that `pack` stacked.

    Args:
        packed: the result of `pack`. After Ray has sent it, its arrays are read-only and lie in
            Ray's shared memory.

    Returns:
        By client id, tensors by name. They are copies, so that no memory of Ray stays in use.
    """
    import numpy as np
    import torch

    clients, arrays = packed
    return {
        client: {name: torch.from_numpy(np.array(rows[k])) for name, rows in arrays.items()}
        for k, client in enumerate(clients)
    }
