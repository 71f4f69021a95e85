"""Output tokens of image patches in CLIP's joint space: what the last layer says at each of them.

As PLOT (Chen et al., ICLR 2023, arXiv 2210.01253) and FedOTP (Li et al., CVPR 2024, arXiv
2403.00041) read them from CLIP: of a vision transformer, the tokens after the last layer, through
`ln_post` and the projection; of a ResNet, all tokens of the attention pool, each with its own
query. `local_features.py` has others: there, a patch looks at itself only.

Suffixes: B images, P patches (no class token), D joint embedding, N positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor

from fedprompt.clip import FrozenCLIP
from fedprompt.local_features import LocalEncoder, patch_encoder


def dense_encoder(clip: FrozenCLIP) -> tuple[LocalEncoder, int] | None:
    """A function from images (B, 3, H, W) to output tokens (B, P, D), and P.

    Tokens are L2-normalised, float32, on the CPU. None where the backbone's image tower is neither
    open_clip's plain vision transformer nor its ResNet.
    """
    return patch_encoder(clip, _from_transformer, _from_resnet)


def _from_transformer(visual: VisionTransformer, images_B3HW: Tensor) -> Tensor:
    x = visual.transformer(visual._embeds(images_B3HW))
    tokens_BPD: Tensor = visual.ln_post(x[:, 1:]) @ visual.proj
    return tokens_BPD


def _from_resnet(visual: ModifiedResNet, images_B3HW: Tensor) -> Tensor:
    x = visual.stem(images_B3HW)
    for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        x = layer(x)
    pool: Any = visual.attnpool
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
    x = x + pool.positional_embedding.to(x.dtype)
    q, k, v = (
        _heads(projection(x), pool.num_heads)
        for projection in (pool.q_proj, pool.k_proj, pool.v_proj)
    )
    mixed_BNw = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    tokens_BPD: Tensor = pool.c_proj(mixed_BNw[:, 1:])
    return tokens_BPD


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, w) -> (B, heads, N, w / heads)."""
    batch, positions, _ = x.shape
    return x.view(batch, positions, heads, -1).transpose(1, 2)
