"""Patch features against plain loops: dense output tokens, and local features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.patch_features import LocalEncoder, dense_encoder, local_encoder
from fedprompt.backbone.vision_tower import VisionTower
from tests.support.builders import random_clip, random_resnet_clip
from tests.support.comparison import relative


def opened(
    encoder: Callable[[FrozenCLIP], tuple[LocalEncoder, int] | None], clip: FrozenCLIP
) -> tuple[LocalEncoder, int]:
    """The encoder of a CLIP that has one."""
    result = encoder(clip)
    assert result is not None
    return result


def test_dense_features_of_a_transformer_are_the_last_layers_tokens() -> None:
    clip, images = random_clip(), torch.randn(3, 3, 32, 32)
    encode, patches = opened(dense_encoder, clip)
    assert patches == 16
    features = encode(images)
    assert torch.allclose(features.norm(dim=-1), torch.ones(3, 16), atol=1e-5)
    tower = VisionTower(clip)
    tower.fast = False
    _, dense = tower(images[None], patches=True)
    assert relative(features, F.normalize(dense[0], dim=-1)) < 1e-5
    # Attention mixes patches: another first patch changes the last one's feature.
    changed = images.clone()
    changed[:, :, :8, :8] = 0
    assert not torch.allclose(encode(changed)[:, -1], features[:, -1], atol=1e-4)


def test_dense_features_of_a_resnet_are_all_tokens_of_the_attention_pool() -> None:
    clip, images = random_resnet_clip(), torch.randn(2, 3, 64, 64)
    encode, patches = opened(dense_encoder, clip)
    assert patches == 4
    visual: Any = clip.model.visual
    pool = visual.attnpool
    with torch.no_grad():
        x = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))
        for b in range(2):
            tokens = [x[b, :, i, j] for i in range(2) for j in range(2)]
            mean = torch.stack(tokens).mean(0)
            rows = torch.stack([mean, *tokens]) + pool.positional_embedding
            q, k, v = pool.q_proj(rows), pool.k_proj(rows), pool.v_proj(rows)
            size = q.shape[1] // pool.num_heads
            mixed = []
            for h in range(pool.num_heads):
                part = slice(h * size, (h + 1) * size)
                share = (q[:, part] @ k[:, part].T / size**0.5).softmax(-1)
                mixed.append(share @ v[:, part])
            out = pool.c_proj(torch.cat(mixed, dim=1))
            # The first token is the pooled feature.
            assert relative(out[0], visual(images)[b]) < 1e-4
            assert relative(encode(images)[b], F.normalize(out[1:], dim=-1)) < 1e-4


@pytest.mark.parametrize("in_projection_bias", [True, False])
def test_local_features_of_a_transformer_equal_a_masked_attention(in_projection_bias: bool) -> None:
    """In the last layer every position may see itself only."""
    clip = random_clip()
    visual = clip.model.visual
    encode, patches = opened(local_encoder, clip)
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
        # With the usual attention the features differ, so the test can tell.
        usual = visual.ln_post(last(visual._embeds(images))) @ visual.proj
        assert not torch.allclose(encode(images), F.normalize(usual[:, 1:], dim=-1), atol=1e-2)


def test_local_features_of_a_resnet_are_values_through_the_output_projection() -> None:
    clip = random_resnet_clip()
    encode, patches = opened(local_encoder, clip)
    assert patches == 4
    visual: Any = clip.model.visual
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        x = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))
        pool = visual.attnpool
        feature = pool.c_proj(pool.v_proj(x[1, :, 1, 0]))
    assert encode(images).shape == (2, 4, 32)
    assert torch.allclose(encode(images)[1, 2], F.normalize(feature, dim=-1), atol=1e-5)


@pytest.mark.parametrize("encoder", [dense_encoder, local_encoder])
def test_other_towers_have_no_patch_features(encoder: Callable[[FrozenCLIP], Any]) -> None:
    clip = random_clip()
    clip.model.visual.pool_type = "avg"
    assert encoder(clip) is None
