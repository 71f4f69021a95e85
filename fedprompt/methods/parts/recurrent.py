"""A bidirectional LSTM of K clients together, over a short sequence such as a prompt's tokens.

PRE uses it on clients in training. Names, shapes, gates and starting values are those of
torch.nn.LSTM with one layer, `bidirectional` and `batch_first`, with K in front of each weight.

Suffixes: K clients, M tokens, d inputs, h hidden width of one direction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedprompt.methods.parts.linear import linear, uniform_start

DIRECTIONS = ("l0", "l0_reverse")


def lstm_start(
    name: str, width: int, hidden: int, seed: int, *purpose: str | int
) -> dict[str, Tensor]:
    """Starting weights without a client axis, uniform between -1/sqrt(h) and 1/sqrt(h).

    Args:
        name: prefix of the tensors' names; it is also part of the key of the draw.
        width: d.
        hidden: h.
        seed: seed of the run.
        purpose: keys the draw, together with `seed` and `name`.

    Returns:
        For each direction `weight_ih` (4h, d), `weight_hh` (4h, h), `bias_ih` and `bias_hh` (4h,).
    """
    bound, gates = 1 / math.sqrt(hidden), 4 * hidden
    shapes = {
        "weight_ih": (gates, width), "weight_hh": (gates, hidden),
        "bias_ih": (gates,), "bias_hh": (gates,),
    }  # fmt: skip
    return {
        f"{name}.{part}_{direction}": uniform_start(
            shape, bound, seed, *purpose, name, part, direction
        )
        for direction in DIRECTIONS
        for part, shape in shapes.items()
    }


def lstm(x_KMd: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Run both directions over the tokens, from zero states.

    Args:
        x_KMd: the tokens of each client.
        tensors: contains the weights of `lstm_start`, with a client axis.
        name: their prefix.

    Returns:
        (K, M, 2h): the forward and the backward hidden states of each token.
    """
    forth = _direction(x_KMd, tensors, name, DIRECTIONS[0])
    back = _direction(x_KMd.flip(1), tensors, name, DIRECTIONS[1]).flip(1)
    return torch.cat([forth, back], dim=-1)


def _direction(x_KMd: Tensor, tensors: Mapping[str, Tensor], name: str, direction: str) -> Tensor:
    weight_ih, weight_hh, bias_ih, bias_hh = (
        tensors[f"{name}.{part}_{direction}"]
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    inputs_KMg = linear(x_KMd, weight_ih, bias_ih + bias_hh)
    hidden_Kh = cell_Kh = inputs_KMg.new_zeros(inputs_KMg.shape[0], weight_hh.shape[-1])
    states = []
    for inputs_Kg in inputs_KMg.unbind(1):
        i, f, g, o = (inputs_Kg + linear(hidden_Kh, weight_hh)).chunk(4, dim=-1)
        cell_Kh = f.sigmoid() * cell_Kh + i.sigmoid() * g.tanh()
        hidden_Kh = o.sigmoid() * cell_Kh.tanh()
        states.append(hidden_Kh)
    return torch.stack(states, dim=1)
