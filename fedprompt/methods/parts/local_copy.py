"""A client's own copy of shared tensors, as they were after its training and before averaging.

Some methods predict on a client with the prompts that it trained last, not with the average that
it will train from next. The copy is private and never trained itself: in a round the shared tensors
are trained, and the copy is taken at the end. A client that has not trained yet uses the shared
tensors.

Suffix: K clients.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedprompt.methods.base import Tensors

PREFIX = "own."
VALID = "own.valid"
"""(1,): 1 if the client predicts with its copy, 0 before and during training."""


def start(shared: Tensors) -> Tensors:
    """Private tensors for a copy of `shared`, without a client axis."""
    copies = {PREFIX + n: t.clone() for n, t in shared.items()}
    return {**copies, VALID: torch.zeros(1)}


def names(shared: Iterable[str]) -> frozenset[str]:
    """Names of these tensors for `Method.frozen`."""
    return frozenset(f"private.{PREFIX}{n}" for n in shared) | {f"private.{VALID}"}


def for_training(private: Tensors) -> Tensors:
    """The private tensors while the shared ones are trained."""
    return private | {VALID: torch.zeros_like(private[VALID])}


def after_training(private: Tensors, shared: Tensors) -> Tensors:
    """The private tensors with a copy of the trained tensors."""
    copies = {PREFIX + n: t for n, t in shared.items() if PREFIX + n in private}
    return private | copies | {VALID: torch.ones_like(private[VALID])}


def model(shared: Tensors, private: Tensors) -> Tensors:
    """The shared tensors (K, ...), those of the copy where it is valid."""
    valid_K1 = private[VALID] > 0
    mine = {n: PREFIX + n for n in shared if PREFIX + n in private}
    return shared | {n: where(valid_K1[:, 0], private[copy], shared[n]) for n, copy in mine.items()}


def where(choose_K: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Rows of `yes` (K, ...) where true, else of `no`; a client axis of 1 broadcasts."""
    return torch.where(choose_K.reshape(-1, *[1] * (yes.dim() - 1)), yes, no)
