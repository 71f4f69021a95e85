"""What one local step of A clients computes: encoding, loss and gradients.

Local training (`fedprompt/training.py`) applies the gradients.

Shape suffixes: A clients that are still training, T loss terms and their sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedprompt.methods.base import Batch, Method, Tensors


@dataclass(frozen=True)
class Computed:
    """What a step has computed.

    Attributes:
        terms: names of the loss terms, and `loss`.
        values_TA: their values, without a gradient; the last row is the sum of those that are
            minimised.
        gradients: the gradient (A, ...) of each trained tensor, None where there is none.
    """

    terms: tuple[str, ...]
    values_TA: Tensor
    gradients: dict[str, Tensor | None]


class LocalStep:
    """Computes the steps of A clients.

    Args:
        method: supplies encoding, loss and gradients.
        leaves: the trained tensors (A, ...), with names as in `named`. The optimiser changes them
            in place between two steps.
        fixed: tensors (A, ...) that are used and not changed, with names as in `named`.
    """

    def __init__(self, method: Method, leaves: Tensors, fixed: Tensors) -> None:
        self.method, self.leaves = method, leaves
        self._shared, self._private = containers(leaves | fixed)

    def __call__(self, batch: Batch) -> Computed:
        """Compute one step. The result holds until the next call.

        Args:
            batch: the images of the step.
        """
        # The class prompts are encoded in every step, since the gradient flows through them.
        encoded = self.method.encode(self._shared, self._private)
        terms = self.method.loss_terms(self._shared, self._private, encoded, batch)
        gradients = self.method.gradients(terms, self.leaves, batch)
        values_TA = torch.stack([term.detach() for term in terms.values()])
        minimised_TA = values_TA
        if measured := self.method.measured:
            minimised_TA = torch.stack([t.detach() for n, t in terms.items() if n not in measured])
        values_TA = torch.cat([values_TA, minimised_TA.sum(0, keepdim=True)])
        return Computed((*terms, "loss"), values_TA, gradients)


def new_leaves(start: Tensors) -> Tensors:
    """Copies of tensors, of which gradients can be taken."""
    return {name: value.clone().requires_grad_() for name, value in start.items()}


def named(shared: Tensors, private: Tensors) -> Tensors:
    """Both containers in one dict; names are `shared.<name>` and `private.<name>`."""
    return {f"shared.{n}": v for n, v in shared.items()} | {
        f"private.{n}": v for n, v in private.items()
    }


def containers(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Split tensors with names as in `named` into the shared and the private container."""
    shared, private = (
        {n.removeprefix(f"{kind}."): v for n, v in tensors.items() if n.startswith(f"{kind}.")}
        for kind in ("shared", "private")
    )
    return shared, private
