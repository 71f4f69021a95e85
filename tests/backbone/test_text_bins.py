"""The packed path of GPUs, run on the CPU: values and gradients of the pass over all positions."""

from __future__ import annotations

import pytest
import torch

from fedprompt.backbone import packing, text_tower
from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_bins import BinTransformer
from fedprompt.backbone.text_tower import TextTower
from tests.backbone.test_text_tower import assert_equals_reference, draw
from tests.support.builders import CLASS_NAMES, random_clip
from tests.support.comparison import relative


@pytest.fixture(autouse=True)
def _in_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_tower, "prefers_bins", lambda device: True)


def _bins(tower: TextTower) -> int:
    assert isinstance(tower.transformer, BinTransformer)
    return tower.transformer.rows // tower.transformer._length


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("largest", [240, 12])
def test_bins_equal_all_77_positions(
    clip: FrozenCLIP,
    lead: tuple[int, ...],
    layers: int,
    largest: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In two bins and in more; two classes have the same name, and share an end."""
    monkeypatch.setattr(packing, "_LARGEST_WITH_PREFIX", largest)
    tower = assert_equals_reference(clip, lead, 4, layers)
    assert _bins(tower) == 2 if largest == 240 else _bins(tower) > 2


def test_quick_gelu_and_any_number_of_tokens() -> None:
    assert_equals_reference(random_clip(quick_gelu=True), (2,), 16, 1)


def test_bins_equal_the_packed_path_of_cpus(
    clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = draw(3, 4, clip.text.width).requires_grad_()
    found = []
    for in_bins in (True, False):
        monkeypatch.setattr(text_tower, "prefers_bins", lambda device, in_bins=in_bins: in_bins)
        tower = TextTower(clip, CLASS_NAMES[:4], 4)
        features = tower(context)
        if in_bins:
            assert _bins(tower) == 1
        found.append((features, torch.autograd.grad(features.square().sum(), context)[0]))
    for ours, theirs in zip(*found, strict=True):
        assert relative(ours, theirs) < 1e-5
