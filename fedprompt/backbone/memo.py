"""Results of the frozen towers that are needed more than once between two trainings.

The class features of one set of prompts are needed by every block of clients, by the server and by
the evaluation protocols, and so are the logits of the server's test images. `fedprompt.scoring`
asks a `Memo` for them, which computes each of them once. Every workspace has one, so a process
computes what is common to all clients once, whatever their number.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

MAX_BYTES = 64 * 2**20
"""Bytes of tensors that a memo holds at most, such as the class features of some models."""


class Memo:
    """Named tensors by key; the least recently used ones make room for new ones.

    A key must determine the result: the method (which holds the class names), the checksum of the
    tensors that a model consists of or the encoded model itself and, where images are involved, the
    very object that holds them. Objects in keys count by identity, and the memo holds them, so that
    none is mistaken for another one.

    Only what is computed from shared tensors may be asked for here; `fedprompt.scoring` keeps to
    that. Results of private tensors are never stored, so that they live no longer than the call
    that needs them, and no client can be answered with another's. Training needs gradients and
    computes everything itself; it clears the memo, because it leads to other tensors.

    Args:
        max_bytes: bytes of tensors that are held at most.

    Attributes:
        max_bytes: the same.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._held: OrderedDict[Hashable, dict[str, Tensor]] = OrderedDict()

    def recall(self, key: Hashable, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a key, which are computed unless they are held.

        Args:
            key: determines the result, see the class.
            compute: computes the tensors.

        Returns:
            The tensors. They are held by reference and must not be changed.
        """
        # A held result has no graph, so it would silently stop the gradient.
        assert not torch.is_grad_enabled(), "a memo serves evaluation only"
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        result = compute()
        if _bytes(result) <= self.max_bytes:
            self._held[key] = result
            while sum(map(_bytes, self._held.values())) > self.max_bytes:
                self._held.popitem(last=False)
        return result

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
