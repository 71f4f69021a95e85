"""What a client reads of the server's messages: tensors, each checked before anything is done."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import ArrayRecord, Message

from fedprompt.errors import UserError
from fedprompt.messages import ARRAYS, EXTRAS, values_of
from fedprompt.methods.base import Tensors
from fedprompt.runtime.peer_text import sanitised
from fedprompt.workspace import Workspace


def received(workspace: Workspace, message: Message) -> Tensors:
    """The shared tensors of a message and the client's extras, as the method declares them."""
    shared = _read(workspace, message, ARRAYS, workspace.shared_shapes)
    if workspace.extras_shapes:
        shared |= _read(workspace, message, EXTRAS, workspace.extras_shapes)
    return shared


def _read(
    workspace: Workspace,
    message: Message,
    record_name: str,
    expected: Mapping[str, tuple[int, ...]],
) -> Tensors:
    """The tensors of a record, all float32.

    Args:
        workspace: names the method in the error message.
        message: the server's message.
        record_name: `ARRAYS` or `EXTRAS`.
        expected: name and shape of every tensor that the method declares.

    Raises:
        UserError: they are not the `expected` ones, in name, shape or type, or not finite.
    """
    record = message.content.get(record_name)
    if not isinstance(record, ArrayRecord) or set(record) != set(expected):
        names = sorted(record) if isinstance(record, ArrayRecord) else "nothing"
        raise UserError(
            f"the server sent {sanitised(str(names))} as {record_name}, but method "
            f"'{workspace.method.name}' expects {sorted(expected)}; server and client must "
            "run the same experiment."
        )
    tensors = {}
    for name, shape in expected.items():
        try:
            array = values_of(record[name])
        except Exception as error:  # malformed bytes make NumPy raise errors of many types
            reason = sanitised(f"{type(error).__name__}: {error}")
            raise UserError(f"the server sent '{name}', which cannot be read ({reason}).") from None
        if array.shape != shape or array.dtype != np.float32:
            raise UserError(
                f"the server sent '{name}' as {array.dtype} {array.shape}; expected float32 "
                f"{shape}. Server and client must run the same experiment."
            )
        # Training from such tensors would turn the private ones, which exist only here, into NaN.
        if not np.isfinite(array).all():
            raise UserError(
                f"the server sent '{name}' with numbers that are not finite; this client neither "
                "trains nor evaluates with it, and keeps what it has."
            )
        # `values_of` has returned a new array, so that training cannot change the message.
        tensors[name] = torch.from_numpy(array)
    return tensors
