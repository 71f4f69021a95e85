"""Which rows of the fast image path are computed, and how prompts lie among images.

`vision_transformer.py` runs the images of all clients in one matrix, client by client, and the
prompts in another one. A prompt that enters at a layer is one row per client; after that layer it
is one row per image.

Shape suffixes: K clients, N = K * B images, T positions of an image (class token and patches),
M prompt tokens, R columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerPlan:
    """What one layer computes.

    Attributes:
        fresh: the prompts enter here, the same for all images of a client.
        live: the next layer uses what this one makes of the prompts.
        first: the layer's image rows are constant.
        class_only: the layer runs at the class token alone.
    """

    fresh: bool
    live: bool
    first: bool
    class_only: bool

    @classmethod
    def of(cls, i: int, layers: int, deep_layers: int, *, patches: bool) -> LayerPlan:
        """The plan of layer `i` of `layers`.

        Args:
            i: from 0.
            layers: number of layers of the tower.
            deep_layers: number of layers after the first at which prompts are replaced.
            patches: whether the patches are read after the last layer.
        """
        last = layers - 1
        return cls(
            fresh=i <= deep_layers,
            live=deep_layers <= i < last,
            first=i == 0,
            class_only=i == last and not patches,
        )


@dataclass(frozen=True)
class ImageLayout:
    """Sizes of the image path: N images in K equal groups, one group per client.

    Attributes:
        images: N.
        positions: T.
        clients: K; 1 where there are no prompts.
        tokens: M; 0 where there are no prompts.
    """

    images: int
    positions: int
    clients: int
    tokens: int

    @classmethod
    def of(cls, image: Tensor, prompts: Tensor | None) -> ImageLayout:
        """The layout of images (N, T, w) and prompts (K, M, w)."""
        clients, tokens = (1, 0) if prompts is None else prompts.shape[:2]
        return cls(image.shape[0], image.shape[1], clients, tokens)

    def per_image(self, prompt: Tensor) -> Tensor:
        """A copy (N, M, ...) of each client's prompts (K * M, ...) for each of its images."""
        each = self.images // self.clients
        by_client = prompt.view(self.clients, 1, self.tokens, *prompt.shape[1:])
        return by_client.expand(-1, each, *by_client.shape[2:]).flatten(0, 1)

    def over_images(self, grad: Tensor) -> Tensor:
        """The sum (K * M, R), in float32, of gradients (N, M, R) over each client's images."""
        # Summed in float32, because a sum of many bfloat16 gradients would lose digits.
        each = self.images // self.clients
        by_client = grad.view(self.clients, each, self.tokens, -1)
        return by_client.sum(1, dtype=torch.float32).flatten(0, 1)
