"""Local features against an attention in which every position sees itself only."""

from __future__ import annotations

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.patch_features import local_encoder
from tests.support.builders import RANDOM_CLIP, random_clip


@pytest.mark.parametrize("in_projection_bias", [True, False])
def test_transformer_patches_equal_a_masked_attention(in_projection_bias: bool) -> None:
    clip = random_clip()
    visual = clip.model.visual
    found = local_encoder(clip)
    assert found is not None
    encode, patches = found
    assert patches == 16
    last = visual.transformer.resblocks[-1]
    with torch.no_grad():
        last.attn.in_proj_bias.normal_() if in_projection_bias else last.attn.in_proj_bias.zero_()
        images = torch.randn(3, 3, 32, 32)
        x = visual._embeds(images)
        for block in visual.transformer.resblocks[:-1]:
            x = block(x)
        alone = torch.full((17, 17), float("-inf")).fill_diagonal_(0.0)
        x = visual.ln_post(last(x, attn_mask=alone)) @ visual.proj
        assert torch.allclose(encode(images), F.normalize(x[:, 1:], dim=-1), atol=1e-5)
        # With the usual attention they are others: the test can tell.
        usual = visual.ln_post(last(visual._embeds(images))) @ visual.proj
        assert not torch.allclose(encode(images), F.normalize(usual[:, 1:], dim=-1), atol=1e-2)


def test_resnet_patches_are_values_through_the_output_projection() -> None:
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIP(**{**RANDOM_CLIP, "vision_cfg": vision})
    clip = FrozenCLIP(model, open_clip.SimpleTokenizer(), name="resnet", weights_hash="seed 0")
    found = local_encoder(clip)
    assert found is not None
    encode, patches = found
    assert patches == 4
    visual, images = model.visual, torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        x = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))
        pool = visual.attnpool
        one = pool.c_proj(pool.v_proj(x[1, :, 1, 0]))
    assert encode(images).shape == (2, 4, 32)
    assert torch.allclose(encode(images)[1, 2], F.normalize(one, dim=-1), atol=1e-5)


def test_other_towers_have_none() -> None:
    clip = random_clip()
    clip.model.visual.pool_type = "avg"
    assert local_encoder(clip) is None
