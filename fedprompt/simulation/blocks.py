"""How clients are grouped into blocks, and how much work a block is.

A grid calls these functions at the start of every exchange. The clients of a block train in the
same batched tensor operations: a large block keeps the processor busy, a small one needs less
memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

from flwr.app import MessageType

from fedprompt.errors import UserError
from fedprompt.runtime import thread_count
from fedprompt.simulation.step_memory import StepMemory
from fedprompt.workspace import Workspace

CPU_TOKENS, GPU_TOKENS = 384, 65536
"""Token positions per call that keep a CPU thread (measured on 2 cores) or a GPU (assumed) busy."""
MEMORY_SHARE = 0.5
"""Fraction of the free memory that a block may take: its need is an estimate, and other programs
take memory as well."""


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
    Clients of a block have one backbone in one format. The grouping depends on the partition, the
    backbones and `size` alone, never on the workers, so the last
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
    held: dict[str, list[int]] = {}
    for i in order:
        held.setdefault(workspace.config.backbone.kind_of(clients[i]), []).append(i)
    return [some[i : i + size] for some in held.values() for i in range(0, len(some), size)]


def choose_size(
    workspace: Workspace,
    clients: int,
    workers: int,
    free_bytes: float,
    threads: int | None = None,
    *,
    kind: str = MessageType.TRAIN,
    client_bytes: float = 0.0,
) -> int:
    """Choose the number of clients per block.

    It is `simulation.clients_per_block` if that is set. Otherwise it is as large as the processor
    and the memory can use, and then lowered so that all workers get the same number of blocks.
    An evaluation has blocks of its own: it keeps nothing for a gradient, and the images of all
    clients of a block are scored a bounded number at a time, so only the prompts count.

    Args:
        workspace: supplies the positions of one client's prompts and images.
        clients: number of clients of the exchange.
        workers: number of processes that share them.
        free_bytes: free memory per worker in bytes; it can only lower the result.
        threads: CPU threads of each worker; by default those of this process.
        kind: type of the messages.
        client_bytes: memory that one client needs, as `step_memory` estimates it.

    Returns:
        Clients per block, at least 1.
    """
    if workspace.config.simulation.clients_per_block:
        return workspace.config.simulation.clients_per_block
    cpu_tokens = CPU_TOKENS * (threads or thread_count(workspace.config.simulation))
    budget = GPU_TOKENS if workspace.clip.device.type == "cuda" else cpu_tokens
    evaluates = kind == MessageType.EVALUATE
    tokens = workspace.prompt_tokens_per_client if evaluates else workspace.tokens_per_client
    fits = MEMORY_SHARE * free_bytes / max(1.0, client_bytes)
    most = max(1, int(min(budget / max(1, tokens), fits)))
    # Blocks that each worker runs one after the other; the clients are spread evenly over them.
    turns = max(1, math.ceil(clients / (most * workers)))
    return max(1, math.ceil(clients / (turns * workers)))


def refuse_large(workspace: Workspace, need: StepMemory, free_bytes: float, workers: int) -> None:
    """Refuse an experiment of which not even one client fits into the memory.

    Args:
        workspace: the experiment.
        need: the estimate for one client.
        free_bytes: free memory per worker in bytes.
        workers: number of processes.

    Raises:
        UserError: a client does not fit.
    """
    method, training = workspace.method, workspace.config.training
    what, size = ("an evaluation", need.evaluation)
    if method.trainable and need.training > size:
        what, size = ("a training step", need.training)
    if size <= free_bytes:
        return
    # The sizes among the method's keys, such as the number of prompts, of tokens or of layers.
    settings = asdict(workspace.config.method)
    keys = [f"method.{n}={v}" for n, v in settings.items() if type(v) is int and v > 1]
    shrinking = [f"the {len(workspace.task.class_names)} classes", *keys]
    if method.trainable and need.kept_by_images > need.kept_by_prompts:
        shrinking.insert(0, f"training.batch_size={training.batch_size}")
    if workers > 1:
        shrinking.append(f"simulation.workers={workers}")
    about = f"about {size / 1e9:.1f} GB" if math.isfinite(size) else "more than that"
    raise UserError(
        f"method '{method.name}': {what} of one client needs {about}, but "
        f"{free_bytes / 1e9:.1f} GB of memory are free for a process. Less is needed with smaller "
        f"numbers of {', '.join(shrinking)}, or a smaller backbone.model; "
        "simulation.clients_per_block=1 tries it all the same."
    )
