"""What a feature table has beside features: an image's patches, pixels, routing or statistics.

`table.open_feature_table` opens them with the features, and `table.encode_inputs` computes them
without the cache. Each is computed from the input of the features' encoding, so that an image is
decoded once for all of them.

Suffixes: B images in a batch, P patches, D joint embedding, E experts, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.layer_statistics import StatisticsEncoder
from fedprompt.backbone.patch_features import LocalEncoder, dense_encoder, local_encoder
from fedprompt.backbone.token_routing import RoutingEncoder, TokenRouting, routing_encoder
from fedprompt.data.features.encoding import Encoding
from fedprompt.errors import UserError


def with_statistics(clip: FrozenCLIP, plain: Encoding) -> list[Encoding]:
    """Return the encodings of images into features, and into statistics (L, 2, w), from one pass.

    Raises:
        UserError: the backbone gives no statistics of its layers.
    """
    both = StatisticsEncoder(clip)
    view = f"statistics-{plain.view}"
    return [
        replace(plain, encode=both.features),
        replace(plain, view=view, shape=both.shape, encode=both.statistics),
    ]


def patches_of(clip: FrozenCLIP, plain: Encoding) -> Encoding:
    """Return the encoding of images into L2-normalised patch features (P, D)."""
    encode, patches = patch_encoder(clip, dense_encoder)
    shape = (patches, clip.embed_dim)
    return replace(plain, view=f"patches-{plain.view}", shape=shape, encode=encode)


def local_of(clip: FrozenCLIP, plain: Encoding) -> Encoding:
    """Return the encoding of images into L2-normalised local features (P, D)."""
    encode, patches = patch_encoder(clip, local_encoder)
    shape = (patches, clip.embed_dim)
    return replace(plain, view=f"local-{plain.view}", shape=shape, encode=encode)


def patch_encoder(
    clip: FrozenCLIP, encoder: Callable[[FrozenCLIP], tuple[LocalEncoder, int] | None]
) -> tuple[LocalEncoder, int]:
    """Return an encoder of images into patch features, and P.

    Raises:
        UserError: the backbone has none.
    """
    found = encoder(clip)
    if found is None:
        raise UserError(
            f"backbone: {clip.name} gives no patch features; take one of open_clip's plain ViT or "
            "ResNet models."
        )
    return found


def routing_of(clip: FrozenCLIP, plain: Encoding, routing: TokenRouting | None) -> Encoding:
    """Return the encoding of images into the weights of experts (2, E)."""
    encode = router(clip, routing)
    assert routing is not None
    view = f"{routing.view}-{plain.view}"
    return replace(plain, view=view, shape=(2, routing.experts), encode=encode)


def router(clip: FrozenCLIP, routing: TokenRouting | None) -> RoutingEncoder:
    """Return an encoder of images into the weights of experts.

    Raises:
        UserError: the backbone's tokens cannot be routed.
    """
    assert routing is not None, "a method that needs routing says which"
    found = routing_encoder(clip, routing)
    if found is None:
        raise UserError(
            f"backbone: {clip.name} has no tokens that can be routed; take one of open_clip's "
            "plain ViT models."
        )
    return found


def pixels_of(clip: FrozenCLIP, plain: Encoding) -> Encoding:
    """Return the encoding of images into the bytes (3, H, W) that preprocessing normalises.

    Bytes need a quarter of the space of floats and lose nothing: preprocessing resizes and crops
    bytes before it normalises them, so rounding restores them exactly.
    """
    mean_3, std_3 = clip.mean_std

    def encode(images_B3HW: Tensor) -> Tensor:
        pixels = images_B3HW * std_3[:, None, None] + mean_3[:, None, None]
        rounded: Tensor = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
        return rounded

    return replace(
        plain,
        view=f"pixels-{plain.view}",
        shape=tuple(clip.preprocess(Image.new("RGB", (64, 64))).shape),
        encode=encode,
        dtype="|u1",
        of_weights=False,
    )
