"""A frozen image transformer under visual prompts, forward and backward.

Both directions are written down, as in `text_transformer.py`: what is kept is what the gradient
of the prompts needs. What the usual pass computes in vain is left out:

- A prompt that enters at a layer is the same for all images of a client, so its norm and
  projections are computed once per client, and their gradient is that of the sum over images.
- Where the next layer replaces the prompts, or none follows, only their keys and values are used:
  no query, no output, no MLP.
- The class token and the patches are constant before the first attention: no gradient goes there.
- The last layer runs at the class token alone, unless patches are asked for.

Suffixes: K clients, N = K * B images, T positions of an image (class token and patches), M prompt
tokens, J deep layers, w width, h heads, e = w / h, R rows; q, k, v are (N, h, positions, e).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.frozen_layer import FrozenLayer, add_product


@dataclass(frozen=True)
class _Plan:
    """What one layer does.

    Attributes:
        fresh: the prompts enter here, the same for all images of a client.
        live: the next layer uses what this one makes of them.
        first: its image rows are constant.
        class_only: it runs at the class token alone.
    """

    fresh: bool
    live: bool
    first: bool
    class_only: bool


@dataclass(frozen=True)
class _Rows:
    """How rows are laid out: N images of T positions, in K groups with M prompt tokens each."""

    images: int
    positions: int
    clients: int
    tokens: int

    def per_image(self, prompt: Tensor) -> Tensor:
        """A copy of each client's prompts (K * M, ...) for each of its images (N, M, ...)."""
        each = self.images // self.clients
        one = prompt.view(self.clients, 1, self.tokens, *prompt.shape[1:])
        return one.expand(-1, each, *one.shape[2:]).flatten(0, 1)

    def over_images(self, grad: Tensor) -> Tensor:
        """The sum of gradients (N, M, R) over each client's images, (K * M, R) float32."""
        each = self.images // self.clients
        by_client = grad.view(self.clients, each, self.tokens, -1)
        return by_client.sum(1, dtype=torch.float32).flatten(0, 1)


class _Norm(NamedTuple):
    """An attention's input rows, with mean and 1 / deviation of its norm."""

    x: Tensor
    mean: Tensor
    rstd: Tensor


class _Mlp(NamedTuple):
    """What `FrozenLayer.mlp_backward` needs."""

    x: Tensor
    mean: Tensor
    rstd: Tensor
    hidden: Tensor


class _Attention(NamedTuple):
    """An attention with its own graph from q, k and v to out."""

    out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class _Kept:
    """What one layer's backward needs; `image` is missing in the first layer."""

    attention: _Attention
    mlp: _Mlp
    image: _Norm | None
    prompt: _Norm | None
    prompt_mlp: _Mlp | None


class ImageTransformer:
    """All but the last norm and projection of an image tower.

    Args:
        layers: at least one.
        heads: h.
    """

    def __init__(self, layers: Sequence[FrozenLayer], heads: int) -> None:
        self.layers = tuple(layers)
        self.heads = heads
        self.width = self.layers[0].out[0].shape[0]
        self.dtype = self.layers[0].qkv[0].dtype

    def __call__(
        self, image: Tensor, prompts: Tensor | None, deep: Tensor | None, *, patches: bool
    ) -> Tensor:
        """Hidden states (N, 1, w) of the class token, or (N, T, w) with `patches`, float32.

        Args:
            image: (N, T, w) class token and patches after `ln_pre`, float32, client by client.
            prompts: (K, M, w) after `ln_pre`, float32; K divides N.
            deep: (K, J, M, w), float32; entry j replaces the prompts at the input of layer j + 1.
            patches: compute the last layer at the patches too.
        """
        given = [t for t in (prompts, deep) if t is not None]
        if torch.is_grad_enabled() and any(t.requires_grad for t in given):
            out: Tensor = _Differentiable.apply(self, image, prompts, deep, patches)
            return out
        with torch.no_grad():
            return self.forward(image, prompts, deep, patches, None)

    def _plan(self, i: int, deep_layers: int, patches: bool) -> _Plan:
        last = len(self.layers) - 1
        return _Plan(
            fresh=i <= deep_layers,
            live=deep_layers <= i < last,
            first=i == 0,
            class_only=i == last and not patches,
        )

    # Forward

    def forward(
        self,
        image: Tensor,
        prompts: Tensor | None,
        deep: Tensor | None,
        patches: bool,
        kept: list[_Kept] | None,
    ) -> Tensor:
        """As `__call__`; fills `kept` for `backward` where it is a list."""
        rows, deep_layers = _layout(image, prompts), 0 if deep is None else deep.shape[1]
        x, prompt = image.flatten(0, 1), None if prompts is None else prompts.flatten(0, 1)
        for i, layer in enumerate(self.layers):
            if deep is not None and 0 < i <= deep_layers:
                prompt = deep[:, i - 1].flatten(0, 1)
            plan = self._plan(i, deep_layers, patches)
            x, prompt = self._layer(layer, plan, rows, x, prompt, kept)
        return x.view(rows.images, -1, self.width)

    def _layer(
        self,
        layer: FrozenLayer,
        plan: _Plan,
        rows: _Rows,
        x: Tensor,
        prompt: Tensor | None,
        kept: list[_Kept] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The next layer's image rows, and its prompt rows where it uses them."""
        n, w = rows.images, self.width
        (q, k, v), mean, rstd = self._project_image(layer, plan, rows, x)
        queries = q.shape[1]
        prompt_norm = prompt_mlp = None
        if prompt is not None:
            parts, *stats = self._project(layer, prompt, slice(None if plan.live else w, None))
            prompt_norm = _Norm(prompt, *stats)
            parts = rows.per_image(parts) if plan.fresh else parts.view(n, rows.tokens, -1)
            *p_q, p_k, p_v = self._heads(parts)
            q = torch.cat([q, *p_q], dim=1)
            k, v = torch.cat([k, p_k], dim=1), torch.cat([v, p_v], dim=1)
        attention = _attend(q, k, v, keep=kept is not None)
        mixed = attention.out.detach().transpose(1, 2).flatten(2)
        at_queries = x.view(n, -1, w)[:, :queries].reshape(-1, w)
        x_1 = add_product(at_queries, mixed[:, :queries].reshape(-1, w), layer.out)
        x_2, *mlp = layer.mlp(x_1)
        p_2 = None
        if prompt is not None and plan.live:
            entering = rows.per_image(prompt).flatten(0, 1) if plan.fresh else prompt
            p_1 = add_product(entering, mixed[:, queries:].reshape(-1, w), layer.out)
            p_2, *p_mlp = layer.mlp(p_1)
            prompt_mlp = _Mlp(p_1, *p_mlp)
        if kept is not None:
            image_norm = None if plan.first else _Norm(x, mean, rstd)
            kept.append(_Kept(attention, _Mlp(x_1, *mlp), image_norm, prompt_norm, prompt_mlp))
        return x_2, p_2

    def _project_image(
        self, layer: FrozenLayer, plan: _Plan, rows: _Rows, x: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Queries, keys and values (N, positions, h, e), and the norm's mean and 1 / deviation."""
        if not plan.class_only:
            qkv, mean, rstd = self._project(layer, x, slice(None))
            return self._heads(qkv.view(rows.images, rows.positions, -1)), mean, rstd
        w = self.width
        normed, mean, rstd = layer.norm_1.forward(x)
        normed = normed.to(self.dtype).view(rows.images, rows.positions, w)
        weight, bias = layer.qkv
        q = F.linear(normed[:, :1], weight[:w], bias[:w])
        kv = F.linear(normed, weight[w:], bias[w:])
        return self._heads(q) + self._heads(kv), mean, rstd

    def _project(self, layer: FrozenLayer, x: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """A part of queries, keys and values of rows, and the norm's mean and 1 / deviation."""
        normed, mean, rstd = layer.norm_1.forward(x)
        weight, bias = layer.qkv
        return F.linear(normed.to(self.dtype), weight[part], bias[part]), mean, rstd

    def _heads(self, parts: Tensor) -> list[Tensor]:
        """(N, positions, parts * w) -> each part (N, positions, h, e)."""
        return list(parts.unflatten(-1, (-1, self.heads, self.width // self.heads)).unbind(2))

    # Backward

    def backward(
        self, grad: Tensor, kept: list[_Kept], rows: _Rows, deep_layers: int, patches: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients (K, M, w) of the prompts and (K, J, M, w) of deep ones, None without any."""
        d_x: Tensor | None = grad.flatten(0, 1)
        d_prompt: Tensor | None = None
        entered: list[Tensor] = []
        for i in range(len(self.layers) - 1, -1, -1):
            assert d_x is not None
            plan = self._plan(i, deep_layers, patches)
            d_x, d_prompt = self._layer_backward(self.layers[i], plan, rows, d_x, d_prompt, kept[i])
            if plan.fresh:
                entered.append(d_prompt.view(rows.clients, rows.tokens, self.width))
                d_prompt = None
        first, *deep = entered[::-1]
        return first, torch.stack(deep, dim=1) if deep else None

    def _layer_backward(
        self,
        layer: FrozenLayer,
        plan: _Plan,
        rows: _Rows,
        d_x: Tensor,
        d_prompt: Tensor | None,
        kept: _Kept,
    ) -> tuple[Tensor | None, Tensor]:
        """Gradients of the image rows (none in the first layer) and of the prompt rows.

        Those of prompts that enter here are summed over images.
        """
        n, w, positions = rows.images, self.width, rows.positions
        d_x = layer.mlp_backward(d_x, *kept.mlp)
        d_mixed = (d_x.to(self.dtype) @ layer.out[0]).view(n, -1, w)
        queries = d_mixed.shape[1]
        if kept.prompt_mlp is not None:
            assert d_prompt is not None
            d_prompt = layer.mlp_backward(d_prompt, *kept.prompt_mlp)
            d_own = (d_prompt.to(self.dtype) @ layer.out[0]).view(n, -1, w)
            d_mixed = torch.cat([d_mixed, d_own], dim=1)
        d_q, d_k, d_v = self._attend_backward(kept.attention, d_mixed)
        d_prompt = self._prompt_backward(
            layer,
            plan,
            rows,
            [d_q[:, queries:]] * plan.live + [d_k[:, positions:], d_v[:, positions:]],
            d_prompt,
            kept,
        )
        if kept.image is None:
            return None, d_prompt
        d_kv = [d_k[:, :positions], d_v[:, :positions]]
        weight = layer.qkv[0]
        if plan.class_only:
            d_normed = (torch.cat(d_kv, dim=-1).flatten(0, 1) @ weight[w:]).float()
            d_normed.view(n, -1, w)[:, 0] += (d_q[:, 0] @ weight[:w]).float()
        else:
            d_qkv = torch.cat([d_q[:, :queries], *d_kv], dim=-1)
            d_normed = (d_qkv.flatten(0, 1) @ weight).float()
        through = layer.norm_1.backward(d_normed, *kept.image)
        through.view(n, -1, w)[:, :queries] += d_x.view(n, -1, w)
        return through, d_prompt

    def _attend_backward(self, attention: _Attention, d_mixed: Tensor) -> tuple[Tensor, ...]:
        """Gradients (N, positions, w) of queries, keys and values."""
        d_out = d_mixed.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out, *inputs = attention
        # Kept for a second gradient of the same step; it ends with the step's own graph.
        found = torch.autograd.grad(out, inputs, d_out, retain_graph=True)
        return tuple(t.transpose(1, 2).flatten(2) for t in found)

    def _prompt_backward(
        self,
        layer: FrozenLayer,
        plan: _Plan,
        rows: _Rows,
        d_parts: list[Tensor],
        d_residual: Tensor | None,
        kept: _Kept,
    ) -> Tensor:
        """Gradient of the prompt rows from that of their (queries,) keys and values (N, M, w)."""
        assert kept.prompt is not None
        d_qkv = torch.cat(d_parts, dim=-1)
        flat = rows.over_images(d_qkv).to(self.dtype) if plan.fresh else d_qkv.flatten(0, 1)
        d_normed = (flat @ layer.qkv[0][0 if plan.live else self.width :]).float()
        d_rows = layer.norm_1.backward(d_normed, *kept.prompt)
        if d_residual is None:
            return d_rows
        if plan.fresh:
            d_residual = rows.over_images(d_residual.view(rows.images, rows.tokens, -1))
        return d_rows.add_(d_residual)


def _layout(image: Tensor, prompts: Tensor | None) -> _Rows:
    clients, tokens = (1, 0) if prompts is None else prompts.shape[:2]
    return _Rows(image.shape[0], image.shape[1], clients, tokens)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, keep: bool) -> _Attention:
    """Attention (N, h, positions, e); `keep` records its graph, and its graph alone."""
    q, k, v = (t.transpose(1, 2).detach().requires_grad_(keep) for t in (q, k, v))
    with torch.set_grad_enabled(keep):
        return _Attention(F.scaled_dot_product_attention(q, k, v), q, k, v)


class _Differentiable(torch.autograd.Function):
    """`ImageTransformer` with its written-down gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        transformer: ImageTransformer,
        image: Tensor,
        prompts: Tensor,
        deep: Tensor | None,
        patches: bool,
    ) -> Tensor:
        kept: list[_Kept] = []
        out = transformer.forward(image, prompts, deep, patches, kept)
        # Not through save_for_backward: it would cut the attentions from their graphs.
        ctx.kept, ctx.rows = kept, _layout(image, prompts)
        ctx.transformer, ctx.patches = transformer, patches
        ctx.deep_layers = 0 if deep is None else deep.shape[1]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, Tensor | None, None]:
        prompts, deep = ctx.transformer.backward(
            grad, ctx.kept, ctx.rows, ctx.deep_layers, ctx.patches
        )
        return None, None, prompts, deep, None
