"""A frozen transformer block as plain tensors, with the gradient of its input and of nothing else.

Products with frozen weights need no saved input, so far less is kept than autograd would keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class FrozenNorm:
    """A layer norm over the last axis, in float32."""

    weight: Tensor
    bias: Tensor
    eps: float

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The normalised `x`, and the mean and 1 / deviation that `backward` needs."""
        return torch.native_layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def backward(self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        """Gradient of `x`."""
        dx: Tensor = torch.ops.aten.native_layer_norm_backward(
            grad, x, self.weight.shape, mean, rstd, self.weight, self.bias, [True, False, False]
        )[0]
        return dx


@dataclass(frozen=True)
class FrozenLayer:
    """One pre-norm residual block of CLIP as plain tensors; weights are (out, in).

    `slope` is QuickGELU's 1.702, in x * sigmoid(slope * x); None means the exact or tanh GELU.
    """

    norm_1: FrozenNorm
    qkv: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    norm_2: FrozenNorm
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    slope: float | None
    approximate: str

    @classmethod
    def of(cls, block: Any, dtype: torch.dtype) -> FrozenLayer:
        """An open_clip block, its matrix products in `dtype`; float32 shares its memory."""
        attn, up, down = block.attn, block.mlp.c_fc, block.mlp.c_proj
        activation = block.mlp.gelu
        is_exact = isinstance(activation, nn.GELU)

        def scaled(weight: Tensor, bias: Tensor, scale: Any) -> tuple[Tensor, Tensor]:
            gamma = getattr(scale, "gamma", None)
            if gamma is not None:
                weight, bias = gamma[:, None] * weight, gamma * bias
            return weight.detach().to(dtype), bias.detach().to(dtype)

        return cls(
            norm_1=_norm(block.ln_1),
            qkv=scaled(attn.in_proj_weight, attn.in_proj_bias, None),
            out=scaled(attn.out_proj.weight, attn.out_proj.bias, block.ls_1),
            norm_2=_norm(block.ln_2),
            up=scaled(up.weight, up.bias, None),
            down=scaled(down.weight, down.bias, block.ls_2),
            slope=None if is_exact else 1.702,
            approximate=activation.approximate if is_exact else "none",
        )

    @staticmethod
    def supports(block: Any) -> bool:
        """Whether `of` knows all parts of a block."""
        if type(block).__name__ != "ResidualAttentionBlock":
            return False
        activation = block.mlp.gelu
        known = isinstance(activation, nn.GELU) or type(activation).__name__ == "QuickGELU"
        return known and isinstance(block.ln_1, nn.LayerNorm)

    def mlp(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x + MLP(norm(x)), and mean, 1 / deviation and pre-activations for `mlp_backward`."""
        normed, mean, rstd = self.norm_2.forward(x)
        weight, bias = self.up
        normed = normed.to(weight.dtype)
        if self.slope is None:
            hidden = F.linear(normed, weight, bias)
            active, scale = F.gelu(hidden, approximate=self.approximate), 1.0
        else:
            # slope * (x W + b) costs nothing inside the product, and silu is one fused kernel.
            s = self.slope
            hidden = torch.addmm(bias, normed, weight.t(), beta=s, alpha=s)
            active, scale = F.silu(hidden), 1 / s
        return add_product(x, active, self.down, scale), mean, rstd, hidden

    def mlp_backward(
        self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, hidden: Tensor
    ) -> Tensor:
        """Gradient of `mlp`'s input."""
        d_hidden = grad.to(hidden.dtype) @ self.down[0]
        if self.slope is None:
            torch.ops.aten.gelu_backward.grad_input(
                d_hidden, hidden, approximate=self.approximate, grad_input=d_hidden
            )
        else:  # the factors slope and 1 / slope cancel
            torch.ops.aten.silu_backward.grad_input(d_hidden, hidden, grad_input=d_hidden)
        d_normed = (d_hidden @ self.up[0]).float()
        return self.norm_2.backward(d_normed, x, mean, rstd).add_(grad)


def _norm(module: Any) -> FrozenNorm:
    return FrozenNorm(module.weight.detach(), module.bias.detach(), module.eps)


def add_product(x: Tensor, y: Tensor, linear: tuple[Tensor, Tensor], scale: float = 1.0) -> Tensor:
    """x + scale * y W^T + b, float32."""
    weight, bias = linear
    if weight.dtype == x.dtype:
        return torch.addmm(x, y, weight.t(), alpha=scale).add_(bias)
    return x + torch.addmm(bias, y, weight.t(), alpha=scale)
