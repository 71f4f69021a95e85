"""Answering the messages of one block of clients, in whichever process holds the workspace.

The inline grid calls `run_block` in the server's process, and the Ray grid in its workers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message

from fedprompt.errors import DamagedFile
from fedprompt.federation.client_app import handle
from fedprompt.messages import Parcel, failure, to_wire
from fedprompt.methods.base import Tensors
from fedprompt.runtime.device_memory import (
    DEVICE_ERRORS,
    device_fault,
    give_back,
    is_shortage,
)
from fedprompt.workspace import Workspace

log = logging.getLogger("fedprompt.grid")

Handler = Callable[
    [Workspace, Sequence[int], Sequence[Message], Mapping[int, Tensors]],
    tuple[list[Message], dict[int, Tensors]],
]
"""A function that answers a block's messages: signature and contract of `client_app.handle`."""


@dataclass(frozen=True)
class Answered:
    """What `run_block` returns.

    Attributes:
        replies: the replies as bytes, in the order of the block. A client that raised has an error
            reply.
        changed: the private tensors that training has changed, by client id.
        fitted: how many clients fitted into the memory together, if the block was too large for
            it; else None.
    """

    replies: list[bytes]
    changed: dict[int, Tensors]
    fitted: int | None = None


def run_block(
    workspace: Workspace,
    block: Sequence[Parcel],
    private: Mapping[int, Tensors],
    answer: Handler = handle,
    *,
    at_once: int | None = None,
) -> Answered:
    """Answer a block's messages, on the process that holds `workspace`.

    A block that does not fit into the memory is halved until it does. If `answer` raises another
    error, every client of the block is tried alone, so that one failing client does not exclude
    the others from the round. A damaged file or a failed device ends the call instead: it is the
    machine's fault and not a client's, and leaving clients out would change the results.

    Args:
        workspace: the workspace of this process.
        block: the block's messages, to clients whose weights are kept in one format.
        private: private tensors of the clients that have trained before, by client id.
        answer: the function that answers the messages.
        at_once: the largest number of clients that `answer` is given; None for the whole block.

    Returns:
        The replies, the private tensors to store, and how many clients fitted.

    Raises:
        DamagedFile: a file that the block reads, such as cached features, is damaged.
        DeviceFault: the device has failed, and this process can no longer use it.
    """
    workspace = workspace.of_client(block[0].client)
    size, fitted = at_once or len(block), None
    waiting = [block[i : i + size] for i in range(0, len(block), size)]
    replies: list[bytes] = []
    changed: dict[int, Tensors] = {}
    while waiting:
        part = waiting.pop(0)
        messages = [parcel.open() for parcel in part]
        clients = [parcel.client for parcel in part]
        try:
            answers, updates = answer(workspace, clients, messages, private)
            replies += [to_wire(reply) for reply in answers]
            changed |= updates
            continue
        except DamagedFile:
            raise
        except DEVICE_ERRORS as error:
            raise device_fault(error) from None
        except Exception as error:
            if len(part) == 1:
                log.debug("client %d failed", clients[0], exc_info=True)
            short, reason = is_shortage(error), _one_line(error)
        # Out of the handler: while an error is handled, its traceback keeps every tensor of the
        # failed call, and the next call would have to fit beside them.
        if short:
            # Smaller blocks need recordings of their own.
            if workspace.graphs is not None:
                workspace.graphs.clear()
            give_back()
        if len(part) == 1:
            replies.append(failure(messages[0], reason))
        elif short:
            size = fitted = math.ceil(len(part) / 2)
            # What follows is as large, so it is cut as well instead of being tried in vain.
            waiting = [p[i : i + size] for p in (part, *waiting) for i in range(0, len(p), size)]
        else:
            waiting[:0] = [[one] for one in part]
    return Answered(replies, changed, fitted)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
