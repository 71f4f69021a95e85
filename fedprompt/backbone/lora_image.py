"""Images -> features, with low-rank additions to the top layers of the image tower.

The layers below the first addition are computed without a graph, and for images that all clients
have in common only once. Above, all images of all clients pass together, each client with its own
factors (`lora_layer.py`). The last layer runs at the class token alone.

Shape suffixes: K clients, B images of each, H x W pixels, N = K * B images, T positions of an
image, w tower width, D joint embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.frozen_layer import RowLayer
from fedprompt.backbone.lora_layer import Additions, clients_of, with_additions
from fedprompt.backbone.vision_tower import VisionTower
from fedprompt.errors import UserError


class LoraImages:
    """Features of images under additions.

    Args:
        tower: the frozen image tower.
        layers: how many of the tower's last layers have additions, at least 1.

    Raises:
        UserError: the image tower is not open_clip's plain vision transformer.
    """

    def __init__(self, tower: VisionTower, layers: int) -> None:
        if not tower.fast:
            raise UserError(
                "backbone: LoRA needs open_clip's plain vision transformer, and the image tower of "
                f"{tower.clip.name} is of another kind; choose another backbone, or "
                "method.image_layers=0."
            )
        self.tower, self.clip, self.layers = tower, tower.clip, layers
        self.heads: int = self.tower.blocks[0].attn.num_heads

    def __call__(self, pixels_KB3HW: Tensor, additions: Additions) -> Tensor:
        """Features of images.

        Args:
            pixels_KB3HW: normalised as by CLIP's preprocessing; a client axis of 1 broadcasts.
            additions: each client's factors; a client axis of 1 broadcasts.

        Returns:
            (K, B, D), float32, not normalised.
        """
        layers, images = self.clip.image_layers, pixels_KB3HW.shape[1]
        clients = max(len(pixels_KB3HW), clients_of(additions))
        # A gradient of the pixels is needed in an attack on them only.
        attacked = pixels_KB3HW.requires_grad and torch.is_grad_enabled()
        with torch.set_grad_enabled(attacked):
            x_NTw = self.tower.embedded(pixels_KB3HW).float()
            for frozen in layers[: len(layers) - self.layers]:
                x_NTw = self._layer(frozen, x_NTw, x_NTw.shape[1])
        x_KBTw = x_NTw.unflatten(0, (-1, images)).expand(clients, -1, -1, -1)
        x_NTw = x_KBTw.flatten(0, 1)
        self.clip.positions_encoded += x_NTw.shape[0] * x_NTw.shape[1]
        wide = {
            group: (a.expand(clients, -1, -1, -1), b.expand(clients, -1, -1, -1))
            for group, (a, b) in additions.items()
        }
        *middle, last = with_additions(layers, wide)
        for layer in middle:
            x_NTw = self._layer(layer, x_NTw, x_NTw.shape[1])
        class_Nw = self._layer(last, x_NTw, 1)[:, 0]
        visual = self.tower.visual
        with self.clip.autocast():
            features_ND = (visual.ln_post(class_Nw) @ visual.proj).float()
        features_KBD: Tensor = features_ND.unflatten(0, (clients, images))
        return features_KBD

    def _layer(self, layer: RowLayer, x_NTw: Tensor, queries: int) -> Tensor:
        """A layer's output (N, queries, w) at the first positions."""
        n, positions, width = x_NTw.shape
        qkv, _ = layer.project(x_NTw.reshape(-1, width))
        parts = qkv.view(n, positions, 3, self.heads, width // self.heads)
        q, k, v = (part.transpose(1, 2) for part in parts.unbind(2))
        mixed = F.scaled_dot_product_attention(q[:, :, :queries], k, v)
        mixed = mixed.transpose(1, 2).reshape(-1, width)
        x = layer.add_attention(x_NTw[:, :queries].reshape(-1, width), mixed)
        return layer.mlp(x)[0].view(n, queries, width)
