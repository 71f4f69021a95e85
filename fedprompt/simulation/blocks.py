"""How clients are grouped into blocks, and how much work a block is.

A grid calls these functions at the start of every exchange. The clients of a block train in the
same batched tensor operations: a large block keeps the processor busy, a small one needs less
memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from flwr.app import MessageType

from fedprompt.runtime import thread_count
from fedprompt.workspace import Workspace

CPU_TOKENS, GPU_TOKENS = 384, 65536
"""Token positions per call that keep a CPU thread (measured on 2 cores) or a GPU (assumed) busy."""
MEMORY_SHARE = 0.5
"""Fraction of the free memory that the activations of a block may take, since their size is only an
estimate."""


def work(workspace: Workspace, kind: str, client: int) -> int:
    """Estimate the work of answering one message.

    Args:
        workspace: supplies the partition and the number of local epochs.
        kind: type of the message.
        client: client id.

    Returns:
        Units of work: training images x local epochs for training, test images for an evaluation,
        and 1 for other messages and for clients that do not exist.
    """
    if not 0 <= client < workspace.num_clients:
        return 1
    if kind == MessageType.TRAIN:
        images = len(workspace.partition.train(client))
        return max(1, images * workspace.config.training.local_epochs)
    if kind == MessageType.EVALUATE:
        return max(1, len(workspace.partition.test(client)))
    return 1


def group(workspace: Workspace, clients: Sequence[int], size: int) -> list[list[int]]:
    """Group clients with similar numbers of training images, most images first.

    If a client finishes early, the rest of its block may be too small to keep the processor busy.
    The grouping depends on the partition and on `size` alone, never on the workers, so the last
    bits of a result do not depend on which workers are alive.

    Args:
        workspace: supplies the partition.
        clients: client ids in the order of their messages.
        size: the largest number of clients per block.

    Returns:
        The blocks, each as positions in `clients`.
    """
    images = [work(workspace, MessageType.TRAIN, c) for c in clients]
    order = sorted(range(len(clients)), key=lambda i: (-images[i], clients[i]))
    return [order[i : i + size] for i in range(0, len(order), size)]


def choose_size(
    workspace: Workspace,
    clients: int,
    workers: int,
    free_bytes: float,
    threads: int | None = None,
) -> int:
    """Choose the number of clients per block.

    It is `simulation.clients_per_block` if that is set. Otherwise it is as large as the processor
    and the memory can use, and then lowered so that all workers get the same number of blocks.

    Args:
        workspace: supplies the cost of one client's training step.
        clients: number of clients of the exchange.
        workers: number of processes that share them.
        free_bytes: free memory per worker in bytes; it can only lower the result.
        threads: CPU threads of each worker; by default those of this process.

    Returns:
        Clients per block, at least 1.
    """
    if workspace.config.simulation.clients_per_block:
        return workspace.config.simulation.clients_per_block
    cpu_tokens = CPU_TOKENS * (threads or thread_count(workspace.config.simulation))
    budget = GPU_TOKENS if workspace.clip.device.type == "cuda" else cpu_tokens
    fits = MEMORY_SHARE * free_bytes / max(1, workspace.step_bytes_per_client)
    most = max(1, int(min(budget / max(1, workspace.tokens_per_client), fits)))
    # Blocks that each worker runs one after the other; the clients are spread evenly over them.
    turns = max(1, math.ceil(clients / (most * workers)))
    return max(1, math.ceil(clients / (turns * workers)))
