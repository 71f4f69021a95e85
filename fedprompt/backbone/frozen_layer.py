"""A frozen transformer block as plain tensors, with the gradient of its input only.

The fast paths of both towers (`text_transformer.py`, `vision_transformer.py`) run through these
blocks in every local training step. Autograd keeps the input of each matrix product, because the
gradient of a weight would need it. Here the weights are constants: the gradient of a product's
input needs the weight alone. What remains to be saved are the inputs of the layer norms, the
attention and the pre-activations of the MLP.

Shape suffixes: R rows (positions of all sequences, flattened), d width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedprompt.backbone.kept_modules import matrix_of
from fedprompt.backbone.matrices import KeptMatrix, linear, times

Linear = tuple[Tensor | KeptMatrix, Tensor]
"""Weight and bias of a product."""


class NormState(NamedTuple):
    """What the backward pass of a layer norm needs: its input, the mean and 1 / deviation."""

    x: Tensor
    mean: Tensor
    rstd: Tensor


class MlpState(NamedTuple):
    """What the backward pass of an MLP needs: the state of its norm, and the pre-activations."""

    x: Tensor
    mean: Tensor
    rstd: Tensor
    hidden: Tensor


class RowLayer(Protocol):
    """A residual block on rows (R, d): `FrozenLayer`, or one with adapters (`lora_layer.py`)."""

    def project(self, x: Tensor) -> tuple[Tensor, Any]:
        """Queries, keys and values (R, 3 d) of rows, and a state that callers may ignore."""
        ...

    def add_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        """x plus the output projection of the attention's values (R, d), float32."""
        ...

    def mlp(self, x: Tensor) -> tuple[Tensor, Any]:
        """x + MLP(norm(x)), float32, and a state that callers may ignore."""
        ...


@dataclass(frozen=True)
class FrozenNorm:
    """A layer norm over the last axis, in float32."""

    weight: Tensor
    bias: Tensor
    eps: float

    def forward(self, x: Tensor) -> tuple[Tensor, NormState]:
        """The normalised `x`, and what `backward` needs."""
        normed, mean, rstd = torch.native_layer_norm(
            x, self.weight.shape, self.weight, self.bias, self.eps
        )
        return normed, NormState(x, mean, rstd)

    def backward(self, grad: Tensor, state: NormState) -> Tensor:
        """Gradient of the input."""
        # The mask asks for the gradient of the input, and not for those of weight and bias.
        dx: Tensor = torch.ops.aten.native_layer_norm_backward(
            grad,
            state.x,
            self.weight.shape,
            state.mean,
            state.rstd,
            self.weight,
            self.bias,
            [True, False, False],
        )[0]
        return dx


@dataclass(frozen=True)
class FrozenLayer:
    """One pre-norm residual block of CLIP as plain tensors.

    Rows and residuals are float32; matrix products run in `dtype`.

    Attributes:
        norm_1: the layer norm before the attention.
        qkv: weight (3 d, d) and bias (3 d) of queries, keys and values, in this order.
        out: weight (d, d) and bias (d) of the attention's output projection.
        norm_2: the layer norm before the MLP.
        up: weight (4 d, d) and bias (4 d) of the MLP's first product, for the usual MLP ratio.
        down: weight (d, 4 d) and bias (d) of its second product.
        slope: 1.702 for QuickGELU, x * sigmoid(slope * x), or 1 where the weights contain it; None
            for GELU.
        folded: the factor of the activation's input that `up` contains, and whose inverse `down`
            does; 1 where they contain none.
        approximate: which GELU, `none` or `tanh`, as in `torch.nn.functional.gelu`.

    Weights are tensors in `dtype`, or kept in fewer bits (`matrices.py`).
    """

    norm_1: FrozenNorm
    qkv: Linear
    out: Linear
    norm_2: FrozenNorm
    up: Linear
    down: Linear
    slope: float | None
    folded: float
    approximate: str

    @classmethod
    def of(cls, block: Any, dtype: torch.dtype) -> FrozenLayer:
        """Read the tensors of an open_clip block.

        Args:
            block: a block for which `supports` is true.
            dtype: of the matrix products. In float32 the layer shares the block's memory.
        """
        attn, up, down = block.attn, block.mlp.c_fc, block.mlp.c_proj
        activation = block.mlp.gelu
        is_exact = isinstance(activation, nn.GELU)
        slope = None if is_exact else 1.702
        # x * sigmoid(s x) = silu(s x) / s. CPUs apply s within the products, to weights that stay
        # open_clip's own. On GPUs autograd would multiply once more for each product, so the
        # factors are part of the weights there.
        folded = slope is not None and up.bias.device.type != "cpu"
        inner, outer = (slope, 1 / slope) if slope and folded else (1.0, 1.0)

        def product(module: Any, bias: Tensor, scale: Any = None, factor: float = 1.0) -> Linear:
            # Layer scale multiplies a product's output, so it is folded into the product.
            weight, gamma = matrix_of(module), getattr(scale, "gamma", None)
            if gamma is not None:
                bias = gamma * bias
            if isinstance(weight, KeptMatrix):
                weight = replace(weight, dtype=dtype)
                weight = weight if gamma is None else weight.scaled(gamma.detach())
                weight = weight if factor == 1 else weight.scaled(factor)
            else:
                weight = (weight if gamma is None else gamma[:, None] * weight).detach().to(dtype)
                weight = weight if factor == 1 else weight * factor
            return weight, bias.detach().to(dtype)

        up_weight, up_bias = product(up, up.bias, factor=inner)
        return cls(
            norm_1=_norm(block.ln_1),
            qkv=product(attn, attn.in_proj_bias),
            out=product(attn.out_proj, attn.out_proj.bias, block.ls_1),
            norm_2=_norm(block.ln_2),
            up=(up_weight, up_bias * inner if folded else up_bias),
            down=product(down, down.bias, block.ls_2, outer),
            slope=1.0 if folded else slope,
            folded=inner,
            approximate=activation.approximate if is_exact else "none",
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix products."""
        return self.qkv[0].dtype

    @staticmethod
    def supports(block: Any) -> bool:
        """Whether a block has only parts that `of` can express."""
        if type(block).__name__ != "ResidualAttentionBlock":
            return False
        activation = block.mlp.gelu
        known = isinstance(activation, nn.GELU) or type(activation).__name__ == "QuickGELU"
        return known and isinstance(block.ln_1, nn.LayerNorm)

    # Queries, keys and values

    def project(self, x: Tensor, part: slice = slice(None)) -> tuple[Tensor, NormState]:
        """Queries, keys and values (R, 3 d) of rows (R, d), or the columns `part` of them."""
        normed, state = self.norm_1.forward(x)
        weight, bias = self.qkv
        return linear(normed.to(weight.dtype), weight[part], bias[part]), state

    def project_backward(
        self, d_parts: Tensor, state: NormState, part: slice = slice(None)
    ) -> Tensor:
        """Compute the gradient of `project`'s rows (R, d).

        Args:
            d_parts: gradient of `project`'s result, in the dtype of the products.
            state: from `project`.
            part: as in `project`.
        """
        return self.norm_1.backward(times(d_parts, self.qkv[0][part]).float(), state)

    def project_few(
        self, x: Tensor, pick: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, NormState]:
        """Queries of some rows, keys and values of all.

        The last layer of a tower is read at a few positions only: these need a query, while every
        position is still looked at.

        Args:
            x: (R, d).
            pick: takes normalised rows (R, d) and returns those that need a query.

        Returns:
            Queries (..., d) of the picked rows, keys and values (R, 2 d), and what
            `project_few_backward` needs.
        """
        normed, state = self.norm_1.forward(x)
        weight, bias = self.qkv
        normed, d = normed.to(weight.dtype), x.shape[-1]
        q = linear(pick(normed), weight[:d], bias[:d])
        return q, linear(normed, weight[d:], bias[d:]), state

    def project_few_backward(
        self,
        d_q: Tensor,
        d_kv: Tensor,
        state: NormState,
        add_picked: Callable[[Tensor, Tensor], object],
    ) -> Tensor:
        """Gradient of `project_few`'s rows (R, d).

        Args:
            d_q: gradient of the queries of the picked rows.
            d_kv: (R, 2 d), gradient of keys and values.
            state: from `project_few`.
            add_picked: adds values at the picked rows to rows (R, d), in place.
        """
        weight, d = self.qkv[0], state.x.shape[-1]
        d_normed = times(d_kv, weight[d:]).float()
        add_picked(d_normed, times(d_q, weight[:d]).float())
        return self.norm_1.backward(d_normed, state)

    # The attention's output, and the MLP

    def add_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        """x (R, d) plus the output projection of the attention's values (R, d), float32."""
        return _add_product(x, mixed, self.out)

    def attention_backward(self, grad: Tensor) -> Tensor:
        """Gradient of `add_attention`'s values (R, d), in the dtype of the products."""
        return times(grad.to(self.out[0].dtype), self.out[0])

    def mlp(self, x: Tensor) -> tuple[Tensor, MlpState]:
        """x + MLP(norm(x)) of rows (R, d), and what `mlp_backward` needs."""
        normed, state = self.norm_2.forward(x)
        hidden = self.expand(normed.to(self.up[0].dtype))
        active, scale = self.activate(hidden)
        return self.add_mlp(x, active, scale), MlpState(*state, hidden)

    def expand(self, normed: Tensor) -> Tensor:
        """The MLP's first product (R, 4 d), times the slope where there is one."""
        weight, bias = self.up
        if self.slope is None:
            return linear(normed, weight, bias)
        if not isinstance(weight, Tensor):
            return linear(normed, weight, bias) * self.slope
        # x * sigmoid(s x) = silu(s x) / s. The factor s costs nothing inside the product, 1 / s
        # nothing inside the next one, and silu is one fused kernel instead of three.
        return torch.addmm(bias, normed, weight.t(), beta=self.slope, alpha=self.slope)

    def activate(self, hidden: Tensor) -> tuple[Tensor, float]:
        """The activation of `expand`'s result, up to a factor, and that factor."""
        if self.slope is None:
            return F.gelu(hidden, approximate=self.approximate), 1.0
        return F.silu(hidden), 1 / self.slope

    def add_mlp(self, x: Tensor, active: Tensor, scale: float) -> Tensor:
        """x (R, d) plus the MLP's second product of `activate`'s result, float32."""
        return _add_product(x, active, self.down, scale)

    def mlp_backward(self, grad: Tensor, state: MlpState) -> Tensor:
        """Gradient of `mlp`'s input (R, d), the residual connection included."""
        hidden = state.hidden
        d_hidden = times(grad.to(hidden.dtype), self.down[0])
        # The activation's gradient overwrites d_hidden: the largest tensor here exists only once.
        if self.slope is None:
            torch.ops.aten.gelu_backward.grad_input(
                d_hidden, hidden, approximate=self.approximate, grad_input=d_hidden
            )
        else:  # the factors slope and 1 / slope cancel
            torch.ops.aten.silu_backward.grad_input(d_hidden, hidden, grad_input=d_hidden)
        d_normed = times(d_hidden, self.up[0]).float()
        return self.norm_2.backward(d_normed, NormState(*state[:3])).add_(grad)


def _norm(module: Any) -> FrozenNorm:
    return FrozenNorm(module.weight.detach(), module.bias.detach(), module.eps)


def _add_product(x: Tensor, y: Tensor, product: Linear, scale: float = 1.0) -> Tensor:
    """x + scale * y W^T + b, float32."""
    weight, bias = product
    if isinstance(weight, KeptMatrix):
        return x + (weight.linear(y) * scale + bias)
    if weight.dtype == x.dtype:
        # One kernel adds the residual while it multiplies.
        return torch.addmm(x, y, weight.t(), alpha=scale).add_(bias)
    # With bfloat16 products the sum with the residual still happens in float32.
    return x + torch.addmm(bias, y, weight.t(), alpha=scale)
