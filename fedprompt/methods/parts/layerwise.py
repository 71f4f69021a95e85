"""Linear layers on what each layer of the image tower says of an image, a network of its own each.

GOPro and AD-CLIP use them on the statistics of tokens (`fedprompt.backbone.layer_statistics`).

Suffixes: K clients, B images, L layers of the image tower, i inputs, o outputs, w tower width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedprompt.methods.batch import Tensors
from fedprompt.methods.parts.linear import linear, linear_start


def layerwise_start(
    name: str, layers: int, outputs: int, inputs: int, seed: int, *purpose: str | int
) -> Tensors:
    """Starting values of L linear layers, each distributed as torch.nn.Linear's.

    Args:
        name: prefix of the tensors' names; it is also part of the key of the draws.
        layers: L.
        outputs: o.
        inputs: i.
        seed: seed of the run.
        purpose: keys the draws, together with `seed` and `name`.

    Returns:
        `name.weight` (L, o, i) and `name.bias` (L, o).
    """
    starts = [linear_start(name, outputs, inputs, seed, *purpose, layer) for layer in range(layers)]
    return {n: torch.stack([start[n] for start in starts]) for n in starts[0]}


def layerwise(x_KBLi: Tensor, tensors: Tensors, name: str) -> Tensor:
    """Each layer's own `x W^T + b`: (K, B, L, o). A client axis of 1 broadcasts on either side."""
    weight_KLoi, bias_KLo = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    out_KLBo = x_KBLi.transpose(1, 2) @ weight_KLoi.transpose(-1, -2) + bias_KLo[:, :, None]
    return out_KLBo.transpose(1, 2)


def over_layers(x_KBLo: Tensor, tensors: Tensors, name: str) -> Tensor:
    """A learned weighted sum over layers, and a bias: (K, B, o)."""
    mixed_KBo1 = linear(
        x_KBLo.transpose(-1, -2), tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    )
    return mixed_KBo1[..., 0]


def style(statistics: Tensor) -> Tensor:
    """The style (..., L, w) that both papers read from statistics (..., L, 2, w).

    Their code halves the sum of mean and standard deviation, by average pooling over the two.
    """
    return statistics.mean(-2)


def content(statistics: Tensor) -> Tensor:
    """The content (..., L, w) of statistics (..., L, 2, w): the mean of the tokens."""
    return statistics[..., 0, :]
