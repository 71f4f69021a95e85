"""Float64 numbers as two float32 tensors: a number rounded, and what the rounding leaves.

Tensors that leave a client are float32. A pair keeps 48 bits of a float64 number in as many bytes;
`strategies/exact_mean.py` averages pairs without a loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedprompt.messages import REST


def split(name: str, values: Tensor, *, rest: bool = True) -> dict[str, Tensor]:
    """The tensors that stand for `values`.

    Args:
        name: the name of the first of them; the other one's is `name + REST`.
        values: float64, of any shape.
        rest: whether to make the other one; without it the values are float32.

    Returns:
        One or two float32 tensors in the shape of `values`.
    """
    rounded = values.float()
    pair = {name: rounded}
    if rest:
        pair[name + REST] = (values.double() - rounded.double()).float()
    return pair


def joined(tensors: dict[str, Tensor], name: str) -> Tensor:
    """The float64 values on the CPU that `split` was given, up to the last 4 of their 52 bits.

    Args:
        tensors: holds the tensor `name`, and perhaps `name + REST`.
        name: the tensor's name.
    """
    value = tensors[name].cpu().double()
    rest = tensors.get(name + REST)
    return value if rest is None else value + rest.cpu().to(torch.float64)
