"""Patch features in CLIP's joint space: dense output tokens, and local features.

They are computed once per image, into the feature cache, before the first round.

`dense_encoder` gives the output tokens of the last layer at each patch, as PLOT (Chen et al.,
ICLR 2023, arXiv 2210.01253) and FedOTP (Li et al., CVPR 2024, arXiv 2403.00041) read them from
CLIP. For a vision transformer these are the tokens after the last layer, through `ln_post` and the
projection; for a ResNet, all tokens of the attention pool, each with its own query.

`local_encoder` gives local features from a tower that was trained for whole images. Source: Extract
Free Dense Labels from CLIP (Zhou et al., ECCV 2022, arXiv 2112.01071); GL-MCM (Miyai et al., IJCV
2025, arXiv 2304.04521) does the same. In the last attention each position looks at itself only:
its own value goes through the output projection and then the same way as the class token's.

Shape suffixes: B images, P patches (no class token), W tower width, D joint embedding, N positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.kept_modules import KeptAttention

LocalEncoder = Callable[[Tensor], Tensor]
"""From preprocessed images (B, 3, H, W) to patch features (B, P, D), L2-normalised, float32, on the
CPU."""


def dense_encoder(clip: FrozenCLIP) -> tuple[LocalEncoder, int] | None:
    """Return an encoder of images into the output tokens of their patches, and P.

    The result is None if the image tower is neither open_clip's plain vision transformer nor its
    ResNet.
    """
    return _patch_encoder(clip, _tokens_of_transformer, _tokens_of_resnet)


def _tokens_of_transformer(visual: VisionTransformer, images_B3HW: Tensor) -> Tensor:
    x = visual.transformer(visual._embeds(images_B3HW))
    # Position 0 is the class token. ln_post and the projection work on each position by itself.
    tokens_BPD: Tensor = visual.ln_post(x[:, 1:]) @ visual.proj
    return tokens_BPD


def _tokens_of_resnet(visual: ModifiedResNet, images_B3HW: Tensor) -> Tensor:
    x = visual.stem(images_B3HW)
    for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        x = layer(x)
    pool: Any = visual.attnpool
    x = x.flatten(2).transpose(1, 2)
    # The attention pool puts the mean first, and open_clip returns only the output at the mean. The
    # attention is repeated here to obtain the outputs at the patches.
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


def local_encoder(clip: FrozenCLIP) -> tuple[LocalEncoder, int] | None:
    """Return an encoder of images into the local features of their patches, and P.

    The result is None if the image tower is neither open_clip's plain vision transformer nor its
    ResNet.
    """
    return _patch_encoder(clip, _from_transformer, _from_resnet)


def _patch_encoder(
    clip: FrozenCLIP,
    from_transformer: Callable[[Any, Tensor], Tensor],
    from_resnet: Callable[[Any, Tensor], Tensor],
) -> tuple[LocalEncoder, int] | None:
    """Make an encoder of the function for the backbone's kind of image tower; return it and P."""
    visual: Any = clip.model.visual
    if isinstance(visual, VisionTransformer) and is_plain(visual):
        tower, patches = from_transformer, visual.positional_embedding.shape[0] - 1
    elif isinstance(visual, ModifiedResNet):
        tower, patches = from_resnet, visual.attnpool.positional_embedding.shape[0] - 1
    else:
        return None

    @torch.no_grad()
    def encode(images_B3HW: Tensor) -> Tensor:
        with clip.autocast():
            patches_BPD = tower(visual, images_B3HW.to(clip.device))
        return F.normalize(patches_BPD.float(), dim=-1).cpu()

    return encode, patches


def is_plain(visual: VisionTransformer) -> bool:
    """Whether a tower has plain blocks and reads its class token through ln_post and a projection.

    Patches are read in the same way; in other towers they might need other steps.
    """
    last = visual.transformer.resblocks[-1]
    return (
        type(last) is ResidualAttentionBlock
        and isinstance(last.attn, (nn.MultiheadAttention, KeptAttention))
        and last.attn.in_proj_weight is not None
        and visual.attn_pool is None
        and visual.pool_type == "tok"
        and not visual.final_ln_after_pool
        and visual.proj is not None
    )


def _from_transformer(visual: VisionTransformer, images_B3HW: Tensor) -> Tensor:
    x = visual._embeds(images_B3HW)
    *blocks, last = visual.transformer.resblocks
    batch_first = visual.transformer.batch_first
    # Block by block, because the last one runs without its attention.
    x = x if batch_first else x.transpose(0, 1)
    for block in blocks:
        x = block(x)
    x_BPW = x if batch_first else x.transpose(0, 1)
    width = x_BPW.shape[-1]
    bias = last.attn.in_proj_bias
    # The last third of the joint weight of queries, keys and values.
    value_BPW = F.linear(
        last.ln_1(x_BPW),
        last.attn.in_proj_weight[2 * width :],
        None if bias is None else bias[2 * width :],
    )
    x_BPW = x_BPW + last.ls_1(last.attn.out_proj(value_BPW))
    x_BPW = x_BPW + last.ls_2(last.mlp(last.ln_2(x_BPW)))
    local_BPD: Tensor = visual.ln_post(x_BPW)[:, 1:] @ visual.proj
    return local_BPD


def _from_resnet(visual: ModifiedResNet, images_B3HW: Tensor) -> Tensor:
    x = visual.stem(images_B3HW)
    for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        x = layer(x)
    pool = visual.attnpool
    local_BPD: Tensor = pool.c_proj(pool.v_proj(x.flatten(2).transpose(1, 2)))
    return local_BPD
