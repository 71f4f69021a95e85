"""Weight matrices kept in fewer bits than float32, and products with them.

A kept matrix is turned into the dtype of the product when it is needed and forgotten afterwards, so
that only the small form takes memory. Activations, sums and gradients stay in the product's dtype,
float32 by default; the matrix is a constant and has no gradient.

| kept as | bits per weight | one scale for |
|---|---|---|
| bf16, fp16 | 16 | - |
| int8 | 8 | each row, symmetric |
| int4 | 4.6 | `GROUP` columns of a row, with a zero point |

Shape suffixes: o outputs (rows), i inputs (columns), R rows of activations, g groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64
"""Columns that share a scale in int4. A row whose length it does not divide is one group."""
FIELDS = ("data", "scale", "zero")


@dataclass(frozen=True)
class KeptMatrix:
    """A weight matrix (o, i) in a small form.

    Attributes:
        data: (o, i), int8 or a 16-bit float; for int4 (o, i / 2), uint8: the first half of the
            columns in the low four bits, the second half in the high ones.
        scale: float32, what the numbers of a row are multiplied by: (o, 1), or (o, g, 1) for int4.
            None for ones.
        zero: (o, g, 1), int8, what is subtracted before; int4 only.
        dtype: dtype of the products.
    """

    data: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> KeptMatrix:
        """The matrix of `tensors`, some of `FIELDS` by name."""
        return cls(tensors["data"], tensors.get("scale"), tensors.get("zero"))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What takes memory, by the names of `FIELDS`."""
        fields = {name: getattr(self, name) for name in FIELDS}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}

    @property
    def shape(self) -> torch.Size:
        """(o, i)."""
        rows, columns = self.data.shape
        return torch.Size((rows, columns if self.zero is None else 2 * columns))

    def __getitem__(self, rows: Any) -> KeptMatrix:
        """Some of the rows: a slice, which shares the memory, or indices."""
        parts: dict[str, Any] = {name: tensor[rows] for name, tensor in self.tensors.items()}
        return replace(self, **parts)

    def scaled(self, factor: Tensor | float) -> KeptMatrix:
        """The matrix with every row times a number, or its own of (o,) numbers."""
        if isinstance(factor, Tensor):
            factor = factor.float()[(..., *[None] * (1 if self.zero is None else 2))]
        scale = self.scale
        if scale is None:
            scale = self.data.new_ones(len(self.data), 1, dtype=torch.float32)
        return replace(self, scale=scale * factor)

    def dense(self) -> Tensor:
        """(o, i) in the dtype of the products."""
        base_oi, scale_o1 = self._base()
        return base_oi if scale_o1 is None else base_oi * scale_o1

    def linear(self, x: Tensor) -> Tensor:
        """x (..., i) times the transposed matrix: (..., o)."""
        out: Tensor = _Linear.apply(x, self)
        return out

    def times(self, y: Tensor) -> Tensor:
        """y (..., o) times the matrix: (..., i), which is the gradient of `linear`'s input."""
        base_oi, scale_o1 = self._base()
        return (y if scale_o1 is None else y * scale_o1[:, 0]) @ base_oi

    def _base(self) -> tuple[Tensor, Tensor | None]:
        """The matrix (o, i) without the scale (o, 1) of its rows, and this scale.

        A scale per row is cheaper beside the product: there are fewer activations than weights.
        """
        if self.zero is None:
            scale = None if self.scale is None else self.scale.to(self.dtype)
            return self.data.to(self.dtype), scale
        assert self.scale is not None
        rows, half = self.data.shape
        base_oi = torch.empty(rows, 2 * half, dtype=self.dtype, device=self.data.device)
        base_oi[:, :half] = self.data & 15
        base_oi[:, half:] = self.data >> 4
        grouped = base_oi.view(rows, self.zero.shape[1], -1)
        grouped.sub_(self.zero).mul_(self.scale)
        return base_oi, None


class _Linear(torch.autograd.Function):
    """`KeptMatrix.linear`, of which autograd keeps the small form instead of the dense one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: KeptMatrix) -> Tensor:
        ctx.matrix = matrix
        base_oi, scale_o1 = matrix._base()
        out = F.linear(x, base_oi)
        return out if scale_o1 is None else out.mul_(scale_o1[:, 0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.matrix.times(grad), None


def linear(x: Tensor, weight: Tensor | KeptMatrix, bias: Tensor | None) -> Tensor:
    """`F.linear` with a matrix in either form."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    out = weight.linear(x)
    return out if bias is None else out + bias


def times(y: Tensor, weight: Tensor | KeptMatrix) -> Tensor:
    """y (..., o) times a matrix (o, i) in either form."""
    return y @ weight if isinstance(weight, Tensor) else weight.times(y)
