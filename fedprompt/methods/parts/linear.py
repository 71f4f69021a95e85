"""Small layers of K clients together: weights are named tensors with a leading client axis.

Shapes are torch's own with K in front, so that a layer of public code can be loaded unchanged. A
client axis of 1 broadcasts, on either side. Suffixes: K clients, i inputs, o outputs, w width of a
layer norm; `...` any axes in between (images, tokens, none).
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.rng import generator


def linear(x_K_i: Tensor, weight_Koi: Tensor, bias_Ko: Tensor | None = None) -> Tensor:
    """`x W^T + b` of each client: (K, ..., i) and (K, o, i) give (K, ..., o)."""
    flat_Kni = x_K_i.reshape(x_K_i.shape[0], -1, x_K_i.shape[-1])
    out_Kno = flat_Kni @ weight_Koi.transpose(-1, -2)
    if bias_Ko is not None:
        out_Kno = out_Kno + bias_Ko[:, None]
    return out_Kno.reshape(out_Kno.shape[0], *x_K_i.shape[1:-1], out_Kno.shape[-1])


def layer_norm(x_K_w: Tensor, weight_Kw: Tensor, bias_Kw: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer norm over the last axis with each client's own scale and shift: (K, ..., w)."""
    middle = (1,) * (x_K_w.dim() - 2)
    weight, bias = (t.reshape(t.shape[0], *middle, t.shape[-1]) for t in (weight_Kw, bias_Kw))
    return F.layer_norm(x_K_w, x_K_w.shape[-1:], eps=eps) * weight + bias


def linear_start(
    name: str, outputs: int, inputs: int, seed: int, *purpose: str | int, bias: bool = True
) -> dict[str, Tensor]:
    """`name.weight` (o, i) and `name.bias` (o,), without a client axis, as torch.nn.Linear starts.

    That is uniform between -1/sqrt(i) and 1/sqrt(i); keyed by `seed`, `purpose` and `name`.
    """
    bound = 1 / math.sqrt(inputs)
    start = {f"{name}.weight": _uniform((outputs, inputs), bound, seed, *purpose, name, "weight")}
    if bias:
        start[f"{name}.bias"] = _uniform((outputs,), bound, seed, *purpose, name, "bias")
    return start


def _uniform(shape: tuple[int, ...], bound: float, seed: int, *purpose: str | int) -> Tensor:
    draw = generator(seed, *purpose).random(shape, dtype=np.float32)
    return torch.from_numpy((2 * draw - 1) * np.float32(bound))
