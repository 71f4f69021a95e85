"""Small layers of K clients together: weights are named tensors with a leading client axis.

Methods use them instead of torch.nn modules, because every client of a block has its own weights.
Shapes are torch's own with K in front, so that a layer of public code can be loaded unchanged. A
client axis of 1 broadcasts, in the input as well as in the weights. Suffixes: K clients, i inputs,
o outputs, w width of a layer norm; `...` any axes in between (images, tokens, none).
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.rng import generator


def linear(x_K_i: Tensor, weight_Koi: Tensor, bias_Ko: Tensor | None = None) -> Tensor:
    """`x W^T + b` for each client.

    Args:
        x_K_i: inputs (K, ..., i).
        weight_Koi: weights of each client.
        bias_Ko: biases of each client, or None.

    Returns:
        Outputs (K, ..., o).
    """
    # With the middle axes flattened this is one batched product (K, n, i) x (K, i, o).
    flat_Kni = x_K_i.reshape(x_K_i.shape[0], -1, x_K_i.shape[-1])
    out_Kno = flat_Kni @ weight_Koi.transpose(-1, -2)
    if bias_Ko is not None:
        out_Kno = out_Kno + bias_Ko[:, None]
    return out_Kno.reshape(out_Kno.shape[0], *x_K_i.shape[1:-1], out_Kno.shape[-1])


def layer_norm(x_K_w: Tensor, weight_Kw: Tensor, bias_Kw: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer norm over the last axis with each client's own scale and shift.

    Args:
        x_K_w: inputs (K, ..., w).
        weight_Kw: scale of each client.
        bias_Kw: shift of each client.
        eps: added to the variance; torch's default.

    Returns:
        Outputs (K, ..., w).
    """
    # torch's `layer_norm` takes one scale and shift for all rows, so they are applied here.
    middle = (1,) * (x_K_w.dim() - 2)
    weight, bias = (t.reshape(t.shape[0], *middle, t.shape[-1]) for t in (weight_Kw, bias_Kw))
    return F.layer_norm(x_K_w, x_K_w.shape[-1:], eps=eps) * weight + bias


def linear_start(
    name: str, outputs: int, inputs: int, seed: int, *purpose: str | int, bias: bool = True
) -> dict[str, Tensor]:
    """Starting values of a linear layer, without a client axis, distributed as torch.nn.Linear's.

    Args:
        name: prefix of the tensors' names; it is also part of the key of the draw.
        outputs: o.
        inputs: i.
        seed: seed of the run.
        purpose: keys the draw, together with `seed` and `name`.
        bias: whether the layer has a bias.

    Returns:
        `name.weight` (o, i) and `name.bias` (o,), uniform between -1/sqrt(i) and 1/sqrt(i).
    """
    bound = 1 / math.sqrt(inputs)
    start = {
        f"{name}.weight": uniform_start((outputs, inputs), bound, seed, *purpose, name, "weight")
    }
    if bias:
        start[f"{name}.bias"] = uniform_start((outputs,), bound, seed, *purpose, name, "bias")
    return start


def uniform_start(shape: tuple[int, ...], bound: float, seed: int, *purpose: str | int) -> Tensor:
    """Draws of `shape`, uniform between -bound and bound, keyed by `seed` and `purpose`."""
    draw = generator(seed, *purpose).random(shape, dtype=np.float32)
    return torch.from_numpy((2 * draw - 1) * np.float32(bound))
