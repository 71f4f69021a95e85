"""A client's own copy of shared tensors, as they were after its training and before averaging.

pFedMoAP and DP2FL predict on a client with the tensors that it trained last, not with the average
from which its next round starts. The copy is private and is never trained itself: during a round
the shared tensors are trained, and the copy is taken at the end. A client that has not trained yet
uses the shared tensors.

Suffix: K clients.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedprompt.methods.base import Tensors

PREFIX = "own."
VALID = "own.valid"
"""(1,): 1 if the client predicts with its copy, 0 before and during training.

It is a float, because all tensors of a method are float32.
"""


def start(shared: Tensors) -> Tensors:
    """Private tensors for a copy of `shared`, without a client axis; the copy is not valid yet."""
    # Cloned, so that shared and private tensors never share memory.
    copies = {PREFIX + n: t.clone() for n, t in shared.items()}
    return {**copies, VALID: torch.zeros(1)}


def names(shared: Iterable[str]) -> frozenset[str]:
    """Names of these tensors, for `Method.frozen`: no optimiser may move the copy."""
    return frozenset(f"private.{PREFIX}{n}" for n in shared) | {f"private.{VALID}"}


def for_training(private: Tensors) -> Tensors:
    """The private tensors during training, when `model` must return the shared tensors."""
    return private | {VALID: torch.zeros_like(private[VALID])}


def after_training(private: Tensors, shared: Tensors) -> Tensors:
    """The private tensors with a valid copy of those trained tensors that are to be copied."""
    # A method may copy some of its shared tensors only, as DP2FL does.
    copies = {PREFIX + n: t for n, t in shared.items() if PREFIX + n in private}
    return private | copies | {VALID: torch.ones_like(private[VALID])}


def model(shared: Tensors, private: Tensors) -> Tensors:
    """The shared tensors (K, ...), replaced by the client's copies where these are valid."""
    # Chosen by client: of the clients of one block, some may not have trained yet.
    valid_K1 = private[VALID] > 0
    mine = {n: PREFIX + n for n in shared if PREFIX + n in private}
    return shared | {n: where(valid_K1[:, 0], private[copy], shared[n]) for n, copy in mine.items()}


def where(choose_K: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Choose rows of one of two tensors for each client.

    Args:
        choose_K: true for clients that get their row of `yes`.
        yes: (K, ...).
        no: (K, ...), or (1, ...) for all clients.
    """
    return torch.where(choose_K.reshape(-1, *[1] * (yes.dim() - 1)), yes, no)
