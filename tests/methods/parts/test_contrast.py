"""The contrast in few kernels equals the one of every set by itself."""

from __future__ import annotations

import pytest
import torch

from fedprompt.methods.parts.alignment import image_text_contrast
from fedprompt.methods.parts.contrast import mean_image_text_contrast
from tests.support.builders import batch_of
from tests.support.twins import features

LABELS = torch.tensor([[0, 1, 0, 2, 2], [1, 1, 1, 0, 2], [2, 0, 1, 1, 1]])
MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])


@pytest.mark.parametrize("sets", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_values_and_gradients_are_equal_to_float_rounding(sets: int, temperature: float) -> None:
    images = features(3, 5, 16)
    classes = [features(3, 3, 16, seed=r + 1).requires_grad_() for r in range(sets)]
    batch = batch_of(images, LABELS, MASK)
    ours = mean_image_text_contrast(images, classes, batch, temperature)
    each = [image_text_contrast(images, c, batch, temperature) for c in classes]
    theirs = torch.stack(each).mean(0)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    found, expected = (torch.autograd.grad(loss.sum(), classes) for loss in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        assert b.abs().max() > 0
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
