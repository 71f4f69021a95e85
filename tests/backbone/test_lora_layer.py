"""A block whose weights contain the activation's slope takes additions as one whose do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.lora_layer import GROUPS, TARGETS, LoraLayer, grouped, product_shape
from tests.support.builders import random_clip
from tests.support.twins import close, draw


@pytest.fixture(scope="module")
def quick_clip() -> FrozenCLIP:
    return random_clip(quick_gelu=True)


def test_folded_slope(quick_clip: FrozenCLIP) -> None:
    layer = quick_clip.text_layers[0]
    assert layer.slope == 1.702
    s = layer.slope
    folded = replace(
        layer,
        up=(layer.up[0] * s, layer.up[1] * s),
        down=(layer.down[0] / s, layer.down[1]),
        slope=1.0,
        folded=s,
    )
    pairs = {}
    for i, target in enumerate(TARGETS):
        outputs, inputs = product_shape(target, layer)
        pairs[target] = [(draw(2, 1, 3, inputs, seed=i), draw(2, 1, outputs, 3, seed=9 + i))]
    added = {g: (a[:, 0], b[:, 0]) for g, (a, b) in grouped(pairs).items()}
    assert set(added) == set(GROUPS)
    x = draw(2 * 4, layer.qkv[0].shape[1])
    plain, other = (LoraLayer(one, added).mlp(x)[0] for one in (layer, folded))
    close(other, plain, rtol=1e-5)
    assert not torch.allclose(plain, layer.mlp(x)[0], atol=1e-2)
