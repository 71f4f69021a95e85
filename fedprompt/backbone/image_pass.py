"""An image tower's own pass in pieces, so that visual prompts can stand among its tokens.

`VisionTower` takes it where its fast path does not apply. Prompts come last, after class token and
patches. What is read afterwards (class token, mean, attention pool) is read without the prompts, as
the tower was trained to read it.

The vision transformers of open_clip and those of timm (ViT, SigLIP, EVA, PE, ViTamin) have these
pieces. Convolutional and windowed towers have no place for a token that belongs to no patch.

Shape suffixes: N images, H x W pixels, T positions of an image without prompts, M prompt tokens,
w tower width, D joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor


class ImagePass(Protocol):
    """The pieces of a vision transformer.

    Attributes:
        blocks: its transformer blocks.
        width: w.
        positions: T.
        patches: those of T that are patches.
        patch_size: height and width of a patch, pixels.
        adaptable: whether the blocks have the parts that adapters use.
        image_axis: the axis of images in what the tower itself passes to its blocks; the tokens'
            is the other of the first two.
    """

    blocks: Sequence[Any]
    width: int
    positions: int
    patches: int
    patch_size: tuple[int, int]
    adaptable: bool
    image_axis: int

    def embed(self, pixels_N3HW: Tensor) -> Tensor:
        """Class token and patches (N, T, w) at the input of the first block."""
        ...

    def patch_embeddings(self, pixels_N3HW: Tensor) -> Tensor:
        """Patches (N, patches, w) with their positions, before any norm: where prompts enter."""
        ...

    def enter(self, prompts: Tensor) -> Tensor:
        """Prompts (..., w) at the input of the first block."""
        ...

    def block(self, i: int, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Block i on (N, T + M, w); `bias` (T + M, T + M) is added to its attention scores."""
        ...

    def read(self, x_NTw: Tensor) -> Tensor:
        """Features (N, D) from the output of the last block, without that of the prompts."""
        ...


class OpenClipImages:
    """The pieces of open_clip's own vision transformer.

    Args:
        visual: the tower.
    """

    adaptable = True

    def __init__(self, visual: VisionTransformer) -> None:
        self.visual: Any = visual
        self.blocks: Sequence[Any] = tuple(self.visual.transformer.resblocks)
        self.positions, self.width = self.visual.positional_embedding.shape
        self.patches = self.positions - 1
        height, width = self.visual.patch_size
        self.patch_size = (height, width)
        # open_clip's transformer takes the batch as first or second axis, as it was built.
        self.image_axis = 0 if self.visual.transformer.batch_first else 1

    def embed(self, pixels_N3HW: Tensor) -> Tensor:
        """As `ImagePass` says."""
        embedded: Tensor = self.visual._embeds(pixels_N3HW)
        return embedded

    def patch_embeddings(self, pixels_N3HW: Tensor) -> Tensor:
        """As `ImagePass` says."""
        patches: Tensor = self.visual.conv1(pixels_N3HW).flatten(2).transpose(1, 2)
        placed: Tensor = patches + self.visual.positional_embedding[1:].to(patches.dtype)
        return placed

    def enter(self, prompts: Tensor) -> Tensor:
        """As `ImagePass` says."""
        normed: Tensor = self.visual.ln_pre(prompts)
        return normed

    def block(self, i: int, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """As `ImagePass` says."""
        if self.image_axis == 0:
            out: Tensor = self.blocks[i](x, attn_mask=bias)
            return out
        swapped: Tensor = self.blocks[i](x.transpose(0, 1), attn_mask=bias).transpose(0, 1)
        return swapped

    def read(self, x_NTw: Tensor) -> Tensor:
        """As `ImagePass` says."""
        pooled: Tensor = self.visual._pool(x_NTw)[0]
        return pooled if self.visual.proj is None else pooled @ self.visual.proj


class TimmImages:
    """The pieces of timm's vision transformers.

    Args:
        visual: open_clip's wrapper of the tower.
    """

    adaptable = False
    image_axis = 0

    def __init__(self, visual: TimmModel) -> None:
        self.head, trunk = visual.head, visual.trunk
        self.trunk: Any = trunk
        self.blocks: Sequence[Any] = tuple(trunk.blocks)
        height, width = trunk.patch_embed.patch_size
        self.patch_size = (height, width)
        parameter = next(trunk.parameters())
        blank = torch.zeros(1, 3, *visual.image_size, device=parameter.device)
        with torch.no_grad():
            embedded_1Tw, self.rotation = self._embedded(blank)
        self.positions, self.width = embedded_1Tw.shape[1:]
        self.patches = self.positions - trunk.num_prefix_tokens

    def _embedded(self, pixels_N3HW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (N, T, w), and what the blocks rotate queries and keys of patches by."""
        x, rotation = self._placed(pixels_N3HW)
        return self.trunk.norm_pre(x), rotation

    def _placed(self, pixels_N3HW: Tensor) -> tuple[Tensor, Tensor | None]:
        """`_embedded` before its norm."""
        found = self.trunk._pos_embed(self.trunk.patch_embed(pixels_N3HW))
        x, rotation = found if isinstance(found, tuple) else (found, None)
        return x, rotation

    def embed(self, pixels_N3HW: Tensor) -> Tensor:
        """As `ImagePass` says."""
        return self._embedded(pixels_N3HW)[0]

    def patch_embeddings(self, pixels_N3HW: Tensor) -> Tensor:
        """As `ImagePass` says."""
        return self._placed(pixels_N3HW)[0][:, -self.patches :]

    def enter(self, prompts: Tensor) -> Tensor:
        """As `ImagePass` says."""
        normed: Tensor = self.trunk.norm_pre(prompts)
        return normed

    def block(self, i: int, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """As `ImagePass` says, but without a bias, which `VisionTower` refuses for these."""
        assert bias is None
        if self.rotation is None:
            out: Tensor = self.blocks[i](x)
            return out
        # Each layer has a rotation of its own in some towers.
        own = getattr(self.trunk, "rope_mixed", False)
        rotation = self.rotation[i] if own else self.rotation
        rotated: Tensor = self.blocks[i](x, rope=_with_prompts(rotation, x, self.positions))
        return rotated

    def read(self, x_NTw: Tensor) -> Tensor:
        """As `ImagePass` says."""
        features: Tensor = self.head(self.trunk.forward_head(self.trunk.norm(x_NTw)))
        return features


def _with_prompts(rotation: Tensor, x: Tensor, positions: int) -> Tensor:
    """A rotation (..., patches, sines and cosines) that leaves the prompts as they are.

    A prompt has no place in the image. Its rows are the rotation by zero: sine 0, cosine 1.
    """
    prompts = x.shape[1] - positions
    sines = rotation.shape[-1] // 2
    rotation = F.pad(rotation, (0, 0, 0, prompts))
    if prompts:
        rotation[..., -prompts:, sines:] = 1
    return rotation


def image_pass(visual: Any) -> ImagePass | None:
    """The pieces of an image tower; None if it has no place for visual prompts."""
    if isinstance(visual, VisionTransformer):
        return OpenClipImages(visual)
    # By name, since timm need not be installed. Classes derived from these differ in what their
    # blocks take.
    if isinstance(visual, TimmModel) and type(visual.trunk).__name__ in (
        "VisionTransformer",
        "Eva",
    ):
        return TimmImages(visual)
    return None
