"""Images and visual prompts -> image features, with gradients to the prompts alone.

Methods with visual prompts or image adapters call `VisionTower` in every training step; all others
use cached image features. Prompts stand behind the patches of a vision transformer, without a
positional embedding and before `ln_pre`; deep prompts replace them at the input of later layers.
This is how MaPLe's and PromptSRC's public code (Khattak et al., CVPR 2023, ICCV 2023) adds VPT (Jia
et al., ECCV 2022) to CLIP. Without prompts the features are open_clip's own.

`vision_transformer.py` is the fast path, for open_clip's plain vision transformer. The plain path
goes through the tower's own blocks (`image_pass.py`); it serves adapters and other transformers,
timm's among them, and `tests/backbone/test_vision_tower.py` compares the two.

Shape suffixes: K clients, B images of each, H x W pixels, N = K * B images, T positions of an image
(class token, P patches, prompts), M prompt tokens, J deep layers, w tower width, D joint embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.frozen_layer import FrozenLayer
from fedprompt.backbone.image_pass import image_pass
from fedprompt.backbone.patch_features import is_plain
from fedprompt.backbone.vision_transformer import ImageTransformer, gain_bias
from fedprompt.errors import UserError

Adapt = Callable[[int, Any, Tensor], Tensor | None]
"""From a layer's number, its block and its input (K, B, T, w) to what is added to its output, or
None. Where the client axis is 1 in the input, it may be K in the result."""


class VisionTower:
    """Image features under learned visual prompts, or with adapters beside the blocks.

    Args:
        clip: the frozen backbone.
        prompt_gain: how many times an image's class token and patches see each prompt: a factor of
            the prompts' exponentials in the softmax of their attention.

    Attributes:
        width: w.
        layers: number of layers of the tower.
        patches: P.
        patch_size: height and width of a patch, pixels.
        fast: whether calls without `adapt` take the fast path.

    Raises:
        UserError: the image tower is no vision transformer, so that prompts have no place in it.
    """

    def __init__(self, clip: FrozenCLIP, prompt_gain: float = 1.0) -> None:
        visual: Any = clip.model.visual
        own = image_pass(visual)
        if own is None:
            kind = type(getattr(visual, "trunk", visual)).__name__
            raise UserError(
                "visual prompts need a plain vision transformer, but the image tower of "
                f"{clip.name} is of another kind ({kind}); choose a ViT backbone."
            )
        self.clip, self.visual, self._own, self.prompt_gain = clip, visual, own, prompt_gain
        self.blocks, self.width, self.patches = own.blocks, own.width, own.patches
        self.layers, self.patch_size = len(own.blocks), own.patch_size
        self._plain_kind = isinstance(visual, VisionTransformer) and is_plain(visual)
        self.fast = self._plain_kind and all(FrozenLayer.supports(block) for block in self.blocks)

        if prompt_gain != 1 and not self._plain_kind:
            raise UserError(
                f"backbone: prompt_attn_gain changes the attention of open_clip's plain vision "
                f"transformer, but the image tower of {clip.name} is of another kind; choose "
                "another backbone, or a gain of 1."
            )

    def check_adapters(self) -> None:
        """Check that adapters can stand beside the blocks.

        Raises:
            UserError: the blocks are of another kind.
        """
        if not self._own.adaptable:
            kind = type(self.blocks[0]).__name__
            raise UserError(
                f"backbone: adapters need image blocks of open_clip, but those of {self.clip.name} "
                f"are of another kind ({kind}); choose another backbone."
            )

    @overload
    def __call__(
        self,
        pixels: Tensor,
        prompts: Tensor | None = ...,
        deep: Tensor | None = ...,
        *,
        patches: Literal[False] = ...,
        adapt: Adapt | None = ...,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        pixels: Tensor,
        prompts: Tensor | None = ...,
        deep: Tensor | None = ...,
        *,
        patches: Literal[True],
        adapt: Adapt | None = ...,
    ) -> tuple[Tensor, Tensor]: ...

    def __call__(
        self,
        pixels: Tensor,
        prompts: Tensor | None = None,
        deep: Tensor | None = None,
        *,
        patches: bool = False,
        adapt: Adapt | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Features of images under prompts.

        Args:
            pixels: (K, B, 3, H, W), normalised as by CLIP's preprocessing. A client axis of 1
                broadcasts, here and in the prompts. If they require a gradient, as in an attack on
                the image, the plain path is taken.
            prompts: (K, M, w).
            deep: (K, J, M, w); entry j replaces the prompts at the input of layer j + 1.
            patches: also return the output tokens of the patches, which pass through `ln_post` and
                the projection as the class token does.
            adapt: adds to the output of blocks; takes the plain path.

        Returns:
            Features (K, B, D), float32, not normalised; with `patches` also the patches'
            (K, B, P, D).

        Raises:
            UserError: there are deep prompts without shallow ones, or for more layers than follow
                the first; adapters or patches are asked for that the tower does not have.
        """
        self._check(prompts, deep)
        if adapt is not None:
            self.check_adapters()
        if patches and not self._plain_kind:
            raise UserError(f"{self.clip.name} gives no features of patches under visual prompts.")
        # An image is constant in training: no gradient is needed before the prompts enter.
        attacked = pixels.requires_grad and torch.is_grad_enabled()
        with torch.set_grad_enabled(attacked):
            image_KBTw = self.embedded(pixels).unflatten(0, pixels.shape[:2])
        if prompts is not None:
            prompts = self._own.enter(prompts)
            clients = max(t.shape[0] for t in (pixels, prompts, deep) if t is not None)
            image_KBTw = image_KBTw.expand(clients, -1, -1, -1)
        if self.fast and adapt is None and not attacked:
            x_KBTw = self._fast(image_KBTw, prompts, deep, patches)
        else:
            with self.clip.autocast():
                x_KBTw = self._plain(image_KBTw, prompts, deep, adapt)
        tokens = 0 if prompts is None else prompts.shape[1]
        images = x_KBTw.shape[0] * x_KBTw.shape[1]
        # Counted as if every position ran in every layer, on both paths.
        self.clip.positions_encoded += images * (self._own.positions + tokens)
        if not self._plain_kind:
            with self.clip.autocast():
                x_NTw = x_KBTw[:, :, : self._own.positions].flatten(0, 1)
                features_ND = self._own.read(x_NTw).float()
            features_KBD: Tensor = features_ND.unflatten(0, x_KBTw.shape[:2])
            return features_KBD
        used = 1 + self.patches if patches else 1
        with self.clip.autocast():
            out = (self.visual.ln_post(x_KBTw[:, :, :used]) @ self.visual.proj).float()
        return (out[:, :, 0], out[:, :, 1:]) if patches else out[:, :, 0]

    def patch_embeddings(self, pixels: Tensor) -> Tensor:
        """Patches (K, B, P, w) with their positions, as prompts enter the tower: before any norm.

        Args:
            pixels: (K, B, 3, H, W), normalised; no gradient reaches them.
        """
        with torch.no_grad(), self.clip.autocast():
            patches = self._own.patch_embeddings(pixels.to(self.clip.device).flatten(0, 1))
        patches_KBPw: Tensor = patches.float().unflatten(0, pixels.shape[:2])
        return patches_KBPw

    def under_own_prompts(self, pixels: Tensor, prompts_KBMw: Tensor) -> Tensor:
        """L2-normalised features (K, B, D), each image under shallow prompts of its own.

        Args:
            pixels: (K, B, 3, H, W), normalised; a client axis of 1 broadcasts.
            prompts_KBMw: the prompts of each image.
        """
        pixels = pixels.expand(prompts_KBMw.shape[0], *pixels.shape[1:])
        # Images with prompts of their own are to the tower what clients of one image are.
        raw_N1D = self(pixels.flatten(0, 1)[:, None], prompts_KBMw.flatten(0, 1))
        features_ND = F.normalize(raw_N1D[:, 0], dim=-1)
        features_KBD: Tensor = features_ND.unflatten(0, pixels.shape[:2])
        return features_KBD

    def embedded(self, pixels_KB3HW: Tensor) -> Tensor:
        """Class token and patches (N, T, w) at the input of the first block."""
        with self.clip.autocast():
            return self._own.embed(pixels_KB3HW.to(self.clip.device).flatten(0, 1))

    def features(self, pixels: Tensor, prompts_KJMw: Tensor) -> Tensor:
        """Compute L2-normalised features (K, B, D) under prompts of the first J layers."""
        return F.normalize(self.raw(pixels, prompts_KJMw), dim=-1)

    def raw(self, pixels: Tensor, prompts_KJMw: Tensor) -> Tensor:
        """Compute features (K, B, D) under prompts of the first J layers, not normalised."""
        first, deep = prompts_KJMw[:, 0], prompts_KJMw[:, 1:]
        return self(pixels, first, deep if deep.shape[1] else None)

    def _check(self, prompts: Tensor | None, deep: Tensor | None) -> None:
        if deep is None:
            return
        if prompts is None:
            raise UserError("deep visual prompts replace shallow ones, but there are none.")
        if deep.shape[1] >= self.layers:
            raise UserError(
                f"{deep.shape[1]} deep visual prompts were given, but the image tower of "
                f"{self.clip.name} has room for {self.layers - 1} after its first layer."
            )

    @cached_property
    def _transformer(self) -> ImageTransformer:
        heads = self.blocks[0].attn.num_heads
        return ImageTransformer(self.clip.image_layers, heads, self.prompt_gain)

    def _fast(
        self, image: Tensor, prompts: Tensor | None, deep: Tensor | None, patches: bool
    ) -> Tensor:
        """Hidden states (K, B, 1 or 1 + P, w) after the last layer."""
        transformer = self._transformer
        if prompts is not None:
            # One kind of prompt may be the same for all clients; the fast path takes one K.
            clients = max(t.shape[0] for t in (prompts, deep) if t is not None)
            prompts = prompts.float().expand(clients, -1, -1)
            deep = None if deep is None else deep.float().expand(clients, -1, -1, -1)
        x_NTw = transformer(image.flatten(0, 1).float(), prompts, deep, patches=patches)
        return x_NTw.view(*image.shape[:2], -1, self.width)

    def _plain(
        self, x: Tensor, prompts: Tensor | None, deep: Tensor | None, adapt: Adapt | None
    ) -> Tensor:
        """Hidden states (K, B, T, w) after the last layer, through the tower's own blocks."""
        # Prompts come last, so the class token and the patches keep their positions.
        seen, bias = x.shape[2], None
        if prompts is not None:
            x = torch.cat([x, _per_image(prompts, x)], dim=2)
            if self.prompt_gain != 1:
                rows, tokens = x[0], x.shape[2] - seen
                bias = gain_bias(self.prompt_gain, rows, x.shape[2], seen, tokens)
        for i, block in enumerate(self.blocks):
            if deep is not None and 0 < i <= deep.shape[1]:
                images = x[:, :, : self._own.positions]
                x = torch.cat([images, _per_image(deep[:, i - 1], x)], dim=2)
            added = None if adapt is None else adapt(i, block, x)
            x = self._own.block(i, x.flatten(0, 1), bias).unflatten(0, x.shape[:2])
            if added is not None:
                x = x + added
        return x


def _per_image(prompts_KMw: Tensor, x_KBTw: Tensor) -> Tensor:
    """(K or 1, M, w) -> (K, B, M, w), each client's prompts for each of its images."""
    return prompts_KMw[:, None].expand(*x_KBTw.shape[:2], -1, -1).to(x_KBTw)
