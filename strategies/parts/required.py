"""What a strategy requires of the method whose tensors it aggregates."""

from __future__ import annotations

from collections.abc import Mapping

from fedprompt.errors import UserError
from fedprompt.messages import Arrays


def require_shared(
    strategy: str, tensor: str, shapes: Mapping[str, tuple[int, ...]], *, example: str
) -> None:
    """Refuse a method that does not share a tensor by which the strategy weighs clients.

    Args:
        strategy: the strategy's name.
        tensor: the tensor's name.
        shapes: shapes of the shared tensors by name; empty if nothing is shared.
        example: a method that shares it.

    Raises:
        UserError: other tensors are shared, but not this one.
    """
    if shapes and tensor not in shapes:
        raise UserError(
            f"strategy {strategy} needs a method that shares '{tensor}', e.g. {example}; this one "
            f"shares {', '.join(sorted(shapes))}."
        )


def require_extra(
    strategy: str,
    tensor: str,
    extras: Arrays | None,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    method: str,
) -> None:
    """Refuse a method that does not declare what the strategy sends beside the shared tensors.

    Args:
        strategy: the strategy's name.
        tensor: name of the extra.
        extras: what the method declares.
        shapes: shapes of the shared tensors by name; empty if nothing is shared.
        method: what kind of method is needed, with an example.

    Raises:
        UserError: tensors are shared, and the extra is not declared.
    """
    if shapes and tensor not in (extras or {}):
        raise UserError(f"strategy {strategy} needs a method {method}.")
