"""A frozen image transformer under visual prompts, forward and backward.

`vision_tower.py` calls it in every local training step of a method with visual prompts. Both
directions are written out, as in `text_transformer.py`: only what the gradient of the prompts needs
is saved, and computations whose result nobody reads are omitted:

- A prompt that enters at a layer is the same for all images of a client, so its norm and
  projections are computed once per client, and their gradient is that of the sum over images.
- Where the next layer replaces the prompts, or none follows, only their keys and values are used:
  they need no query, no output projection and no MLP.
- The class token and the patches are constant before the first attention: no gradient goes there.
- The last layer runs at the class token alone, unless patches are asked for.

Shape suffixes: K clients, N = K * B images, T positions of an image (class token and patches),
M prompt tokens, J deep layers, w width, h heads, e = w / h; q, k, v are (N, h, positions, e).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.frozen_layer import FrozenLayer, MlpState, NormState
from fedprompt.backbone.vision_layout import ImageLayout, LayerPlan


class _Attention(NamedTuple):
    """An attention with a graph of its own, from q, k and v to out."""

    out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class _LayerState:
    """What one layer's backward pass needs; `image` is None in the first layer."""

    attention: _Attention
    mlp: MlpState
    image: NormState | None
    prompt: NormState | None
    prompt_mlp: MlpState | None


class ImageTransformer:
    """An image tower without its last norm and projection.

    Args:
        layers: the tower's layers, at least one.
        heads: h.
        prompt_gain: as in `VisionTower`.
    """

    def __init__(self, layers: Sequence[FrozenLayer], heads: int, prompt_gain: float = 1.0) -> None:
        self.layers = tuple(layers)
        self.heads, self.prompt_gain = heads, prompt_gain
        self._biases: dict[tuple[Any, ...], Tensor] = {}
        self.width = self.layers[0].out[0].shape[0]

    def __call__(
        self, image: Tensor, prompts: Tensor | None, deep: Tensor | None, *, patches: bool
    ) -> Tensor:
        """Hidden states after the last layer.

        Args:
            image: (N, T, w) class token and patches after `ln_pre`, float32, client by client.
            prompts: (K, M, w) after `ln_pre`, float32; K divides N.
            deep: (K, J, M, w), float32; entry j replaces the prompts at the input of layer j + 1.
            patches: compute the last layer at the patches too.

        Returns:
            (N, 1, w) of the class token, or (N, T, w) with `patches`, float32.
        """
        given = [t for t in (prompts, deep) if t is not None]
        if torch.is_grad_enabled() and any(t.requires_grad for t in given):
            out: Tensor = _Differentiable.apply(self, image, prompts, deep, patches)
            return out
        with torch.no_grad():
            return self.forward(image, prompts, deep, patches, None)

    # Forward

    def forward(
        self,
        image: Tensor,
        prompts: Tensor | None,
        deep: Tensor | None,
        patches: bool,
        states: list[_LayerState] | None,
    ) -> Tensor:
        """Run the layers without autograd.

        Args:
            image: as in `__call__`.
            prompts: as in `__call__`.
            deep: as in `__call__`.
            patches: as in `__call__`.
            states: receives what `backward` needs, one entry per layer; None if no gradient is
                needed.

        Returns:
            Hidden states, as `__call__` returns them.
        """
        layout = ImageLayout.of(image, prompts)
        deep_layers = 0 if deep is None else deep.shape[1]
        x, prompt = image.flatten(0, 1), None if prompts is None else prompts.flatten(0, 1)
        for i, layer in enumerate(self.layers):
            if deep is not None and 0 < i <= deep_layers:
                prompt = deep[:, i - 1].flatten(0, 1)
            plan = LayerPlan.of(i, len(self.layers), deep_layers, patches=patches)
            x, prompt = self._layer(layer, plan, layout, x, prompt, states)
        return x.view(layout.images, -1, self.width)

    def _layer(
        self,
        layer: FrozenLayer,
        plan: LayerPlan,
        layout: ImageLayout,
        x: Tensor,
        prompt: Tensor | None,
        states: list[_LayerState] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The next layer's image rows, and its prompt rows where it uses them."""
        n, w = layout.images, self.width
        (q, k, v), norm = self._project_image(layer, plan, layout, x)
        queries = q.shape[1]
        prompt_norm = prompt_mlp = None
        if prompt is not None:
            parts, prompt_norm = layer.project(prompt, self._prompt_part(plan))
            # Projected once per client, then copied to the client's images.
            parts = layout.per_image(parts) if plan.fresh else parts.view(n, layout.tokens, -1)
            *prompt_q, prompt_k, prompt_v = self._heads(parts)
            q = torch.cat([q, *prompt_q], dim=1)
            k, v = torch.cat([k, prompt_k], dim=1), torch.cat([v, prompt_v], dim=1)
        bias = self._bias(queries, q, k, layout)
        attention = _attend(q, k, v, bias, keep=states is not None)
        mixed = attention.out.detach().transpose(1, 2).flatten(2)
        at_queries = x.view(n, -1, w)[:, :queries].reshape(-1, w)
        x_1 = layer.add_attention(at_queries, mixed[:, :queries].reshape(-1, w))
        x_2, mlp = layer.mlp(x_1)
        prompt_2 = None
        if prompt is not None and plan.live:
            entering = layout.per_image(prompt).flatten(0, 1) if plan.fresh else prompt
            prompt_1 = layer.add_attention(entering, mixed[:, queries:].reshape(-1, w))
            prompt_2, prompt_mlp = layer.mlp(prompt_1)
        if states is not None:
            image_norm = None if plan.first else norm
            states.append(_LayerState(attention, mlp, image_norm, prompt_norm, prompt_mlp))
        return x_2, prompt_2

    def _bias(self, images: int, q: Tensor, k: Tensor, layout: ImageLayout) -> Tensor | None:
        """`gain_bias` of a layer's attention, of which a tower has few shapes; None without one."""
        prompts = k.shape[1] - layout.positions
        if self.prompt_gain == 1 or not prompts:
            return None
        key = (images, q.shape[1], k.shape[1], q.dtype)
        if key not in self._biases:
            self._biases[key] = gain_bias(self.prompt_gain, q, k.shape[1], images, prompts)
        return self._biases[key]

    def _project_image(
        self, layer: FrozenLayer, plan: LayerPlan, layout: ImageLayout, x: Tensor
    ) -> tuple[list[Tensor], NormState]:
        """Queries, keys and values (N, positions, h, e) of the images."""
        shape = (layout.images, layout.positions, -1)
        if not plan.class_only:
            qkv, norm = layer.project(x)
            return self._heads(qkv.view(shape)), norm
        q, kv, norm = layer.project_few(x, lambda rows: rows.view(shape)[:, :1])
        return self._heads(q) + self._heads(kv.view(shape)), norm

    def _prompt_part(self, plan: LayerPlan) -> slice:
        """Columns of queries, keys and values that the prompts need."""
        return slice(None) if plan.live else slice(self.width, None)

    def _heads(self, parts: Tensor) -> list[Tensor]:
        """(N, positions, parts * w) -> each part (N, positions, h, e)."""
        return list(parts.unflatten(-1, (-1, self.heads, self.width // self.heads)).unbind(2))

    # Backward

    def backward(
        self,
        grad: Tensor,
        states: list[_LayerState],
        layout: ImageLayout,
        deep_layers: int,
        patches: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the gradients of the prompts.

        Args:
            grad: gradient of `forward`'s result, float32.
            states: from `forward`.
            layout: layout of the images and prompts.
            deep_layers: J.
            patches: as in `forward`.

        Returns:
            Gradients (K, M, w) of the prompts and (K, J, M, w) of the deep ones, None where there
            are none.
        """
        d_x: Tensor | None = grad.flatten(0, 1)
        d_prompt: Tensor | None = None
        entered: list[Tensor] = []
        for i in range(len(self.layers) - 1, -1, -1):
            assert d_x is not None
            layer = self.layers[i]
            plan = LayerPlan.of(i, len(self.layers), deep_layers, patches=patches)
            d_x, d_prompt = self._layer_backward(layer, plan, layout, d_x, d_prompt, states[i])
            if plan.fresh:
                entered.append(d_prompt.view(layout.clients, layout.tokens, self.width))
                d_prompt = None
        first, *deep = entered[::-1]
        return first, torch.stack(deep, dim=1) if deep else None

    def _layer_backward(
        self,
        layer: FrozenLayer,
        plan: LayerPlan,
        layout: ImageLayout,
        d_x: Tensor,
        d_prompt: Tensor | None,
        state: _LayerState,
    ) -> tuple[Tensor | None, Tensor]:
        """Gradients of the image rows (None in the first layer) and of the prompt rows.

        Those of prompts that enter here are summed over images.
        """
        n, w, positions = layout.images, self.width, layout.positions
        d_x = layer.mlp_backward(d_x, state.mlp)
        d_mixed = layer.attention_backward(d_x).view(n, -1, w)
        queries = d_mixed.shape[1]
        if state.prompt_mlp is not None:
            assert d_prompt is not None
            d_prompt = layer.mlp_backward(d_prompt, state.prompt_mlp)
            d_prompt_mixed = layer.attention_backward(d_prompt).view(n, -1, w)
            d_mixed = torch.cat([d_mixed, d_prompt_mixed], dim=1)
        d_q, d_k, d_v = self._attend_backward(state.attention, d_mixed)
        d_parts = [d_q[:, queries:]] * plan.live + [d_k[:, positions:], d_v[:, positions:]]
        d_prompt = self._prompt_backward(layer, plan, layout, d_parts, d_prompt, state)
        if state.image is None:
            return None, d_prompt
        d_kv = [d_k[:, :positions], d_v[:, :positions]]
        if plan.class_only:
            through = layer.project_few_backward(
                d_q[:, 0],
                torch.cat(d_kv, dim=-1).flatten(0, 1),
                state.image,
                lambda rows, values: rows.view(n, -1, w)[:, 0].add_(values),
            )
        else:
            d_qkv = torch.cat([d_q[:, :queries], *d_kv], dim=-1)
            through = layer.project_backward(d_qkv.flatten(0, 1), state.image)
        through.view(n, -1, w)[:, :queries] += d_x.view(n, -1, w)
        return through, d_prompt

    def _attend_backward(self, attention: _Attention, d_mixed: Tensor) -> tuple[Tensor, ...]:
        """Gradients (N, positions, w) of queries, keys and values."""
        d_out = d_mixed.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out, *inputs = attention
        # Retained, because a method may take a second gradient of the same step; it is freed
        # together with the step's own graph.
        gradients = torch.autograd.grad(out, inputs, d_out, retain_graph=True)
        return tuple(t.transpose(1, 2).flatten(2) for t in gradients)

    def _prompt_backward(
        self,
        layer: FrozenLayer,
        plan: LayerPlan,
        layout: ImageLayout,
        d_parts: list[Tensor],
        d_residual: Tensor | None,
        state: _LayerState,
    ) -> Tensor:
        """Gradient of the prompt rows from that of their (queries,) keys and values (N, M, w)."""
        assert state.prompt is not None
        d_qkv = torch.cat(d_parts, dim=-1)
        # Prompts that enter here: the sum over images comes first, so that one product per client
        # is enough.
        summed = layout.over_images(d_qkv).to(d_qkv.dtype) if plan.fresh else d_qkv.flatten(0, 1)
        d_prompt = layer.project_backward(summed, state.prompt, self._prompt_part(plan))
        if d_residual is None:
            return d_prompt
        if plan.fresh:
            by_image = d_residual.view(layout.images, layout.tokens, -1)
            d_residual = layout.over_images(by_image)
        return d_prompt.add_(d_residual)


def gain_bias(gain: float, q: Tensor, columns: int, images: int, prompts: int) -> Tensor:
    """What is added to attention scores, so that queries of images see prompts `gain` times.

    Args:
        gain: factor of the prompts' exponentials in the softmax of an image's query.
        q: queries (N, rows, ...).
        columns: number of keys.
        images: how many of the queries, the first ones, belong to the class token and patches.
        prompts: how many of the keys, the last ones, belong to prompts.

    Returns:
        (rows, columns), log(gain) where it applies and 0 elsewhere.
    """
    bias = q.new_zeros(q.shape[1], columns)
    bias[:images, columns - prompts :] = math.log(gain)
    return bias


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, keep: bool) -> _Attention:
    """Attention of q, k and v (N, positions, h, e); `keep` records a graph of it alone.

    `bias` (queries, keys) is added to the scaled scores.

    PyTorch's fused kernel has no public backward function, so autograd calls it.
    """
    q, k, v = (t.transpose(1, 2).detach().requires_grad_(keep) for t in (q, k, v))
    with torch.set_grad_enabled(keep):
        return _Attention(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), q, k, v)


class _Differentiable(torch.autograd.Function):
    """`ImageTransformer` with its own gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        transformer: ImageTransformer,
        image: Tensor,
        prompts: Tensor,
        deep: Tensor | None,
        patches: bool,
    ) -> Tensor:
        states: list[_LayerState] = []
        out = transformer.forward(image, prompts, deep, patches, states)
        # Not through save_for_backward: it would cut the attentions from their graphs.
        ctx.states, ctx.layout = states, ImageLayout.of(image, prompts)
        ctx.transformer, ctx.patches = transformer, patches
        ctx.deep_layers = 0 if deep is None else deep.shape[1]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, Tensor | None, None]:
        prompts, deep = ctx.transformer.backward(
            grad, ctx.states, ctx.layout, ctx.deep_layers, ctx.patches
        )
        return None, None, prompts, deep, None
