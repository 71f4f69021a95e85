"""The gradient of normalised rows in few kernels is autograd's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fedprompt.methods.parts.normalised import in_few_kernels, normalised
from tests.support.twins import draw


def test_values_and_gradients_are_those_of_torch() -> None:
    x = draw(3, 4, 16).requires_grad_()
    weight = draw(3, 4, 16, seed=1)
    ours, theirs = in_few_kernels(x), F.normalize(x, dim=-1)
    assert torch.equal(ours, theirs)
    assert torch.equal(normalised(x), theirs)
    found, expected = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, theirs))
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_row_of_zeros_stays_zero() -> None:
    assert torch.equal(in_few_kernels(torch.zeros(2, 3)), torch.zeros(2, 3))
