"""Mean and standard deviation of an image tower's tokens, layer by layer.

They describe the style of an image (AdaIN: Huang, Belongie, ICCV 2017, arXiv 1703.06868), and their
mean alone its content. GOPro and AD-CLIP (Singha et al., 2023) write prompts from them. They come
from the feature cache, and from the same pass through the tower as the image's features.

Shape suffixes: B images, L layers, T tokens of an image (class token and patches), w tower width,
D joint embedding.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.image_pass import image_pass
from fedprompt.errors import UserError


class StatisticsEncoder:
    """Features and statistics of images, from one pass through the tower.

    The last batch is remembered, so that whoever asks for both of the same tensor pays for one.

    Args:
        clip: the frozen backbone.

    Attributes:
        shape: (L, 2, w), the statistics of one image; mean first, then standard deviation.

    Raises:
        UserError: the image tower is no vision transformer.
    """

    def __init__(self, clip: FrozenCLIP) -> None:
        visual: Any = clip.model.visual
        own = image_pass(visual)
        if own is None:
            kind = type(getattr(visual, "trunk", visual)).__name__
            raise UserError(
                f"backbone: the image tower of {clip.name} ({kind}) gives no statistics of its "
                "layers' tokens; choose a ViT backbone."
            )
        self._clip, self._own = clip, own
        self.shape = (len(own.blocks), 2, own.width)
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def features(self, images_B3HW: Tensor) -> Tensor:
        """Features (B, D), the same bits as `clip.encode_images` gives."""
        return self._encoded(images_B3HW)[1]

    def statistics(self, images_B3HW: Tensor) -> Tensor:
        """Statistics (B, L, 2, w) of the tokens behind each layer, float32, on the CPU."""
        return self._encoded(images_B3HW)[2]

    @torch.no_grad()
    def _encoded(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._last is not None and self._last[0] is images_B3HW:
            return self._last
        found: list[Tensor] = []
        tokens = 1 - self._own.image_axis

        def note(_block: Any, _inputs: Any, out: Tensor) -> None:
            # Reduced at once, so that the tokens of no other layer stay in memory.
            variance_Bw, mean_Bw = torch.var_mean(out.float(), dim=tokens, correction=0)
            found.append(torch.stack([mean_Bw, variance_Bw.sqrt()], dim=1))

        with ExitStack() as stack:
            for block in self._own.blocks:
                stack.callback(block.register_forward_hook(note).remove)
            features_BD = self._clip.encode_images(images_B3HW)
        # Small batches are filled up with further images, which come last.
        statistics_BL2w = torch.stack(found, dim=1)[: len(images_B3HW)].cpu()
        self._last = images_B3HW, features_BD, statistics_BL2w
        return self._last
