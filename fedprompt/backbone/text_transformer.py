"""A frozen causal transformer over learned contexts and constant suffixes, forward and backward.

`text_tower.py` calls it in every local training step and evaluation. Autograd would keep what only
weight gradients need, fill whole tensors with zeros for every slice, and add them up. Here both
directions are written out: only what the gradient of the context needs is saved, and nearly all of
the time is spent in matrix products over the tokens of all clients together (`scripts/bench.py
limit` measures how nearly). `fedprompt/bench/reference.py` states the same mathematics plainly, and
`tests/backbone/test_text_tower.py` compares values and gradients.

What is constant is computed once: the keys and values of the special tokens before the context in
every layer (they see nothing else), and the first layer's projections of the suffix tokens. The
last layer runs at the end-of-text tokens only.

`text_layout.py` defines the order of rows. Shape suffixes: N prompts, M context tokens, J deep
layers, d width, h heads, e = d / h, F special tokens before the context, P = F + M prefix tokens,
B bins of a prompt, S slots of a bin, E end slots of a bin, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedprompt.backbone.frozen_layer import FrozenLayer, MlpState, NormState
from fedprompt.backbone.packing import Packing
from fedprompt.backbone.text_attention import (
    AttentionState,
    additive,
    attend,
    head_major,
    key_value_gradients,
    score_gradient,
)
from fedprompt.backbone.text_layout import TextLayout


class _LayerState(NamedTuple):
    """What one layer's backward pass needs.

    In the first layer `norm` covers the context rows only. In the last layer `mlp` covers the end
    rows only, and the tensors of `context` are empty.
    """

    norm: NormState
    suffix: AttentionState
    context: AttentionState
    mlp: MlpState

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors in a row, as `save_for_backward` takes them."""
        return (*self.norm, *self.suffix, *self.context, *self.mlp)

    @classmethod
    def of(cls, flat: Sequence[Tensor]) -> _LayerState:
        """The inverse of `tensors`."""
        return cls(
            NormState(*flat[:3]),
            AttentionState(*flat[3:7]),
            AttentionState(*flat[7:11]),
            MlpState(*flat[11:]),
        )


_TENSORS = sum(len(part._fields) for part in (NormState, AttentionState, AttentionState, MlpState))


class PromptTransformer:
    """A text tower without its last norm and projection, for one class list and context length.

    Args:
        layers: the tower's layers, at least two.
        packing: where the suffix tokens lie.
        suffix_BSd: embeddings of the suffix tokens, positions added.
        before_Fd: embeddings of the special tokens before the context, positions added.
        context_tokens: M.
        heads: h.
    """

    def __init__(
        self,
        layers: Sequence[FrozenLayer],
        packing: Packing,
        suffix_BSd: Tensor,
        before_Fd: Tensor,
        context_tokens: int,
        heads: int,
    ) -> None:
        self.layers = tuple(layers)
        self.dtype = self.layers[0].dtype
        self.layout = TextLayout(
            packing,
            first=before_Fd.shape[0],
            tokens=context_tokens,
            width=suffix_BSd.shape[-1],
            heads=heads,
            device=suffix_BSd.device,
        )
        self._suffix_BSd = suffix_BSd
        with torch.no_grad():
            self._before_kv = self._constant_keys(before_Fd)
            self._suffix_qkv = self.layers[0].project(suffix_BSd)[0].flatten(0, 1)

    def __call__(self, context: Tensor, deep: Tensor | None) -> Tensor:
        """Hidden states at the end-of-text tokens after the last layer.

        Args:
            context: (N, M, d) with positions, float32.
            deep: (N, J, M, d); entry j replaces the context at the input of layer j + 1.

        Returns:
            (N, C, d), float32.
        """
        wants_grad = context.requires_grad or (deep is not None and deep.requires_grad)
        if torch.is_grad_enabled() and wants_grad:
            out: Tensor = _Differentiable.apply(self, context, deep)
            return out
        with torch.no_grad():
            return self.forward(context, deep, None)

    @property
    def rows(self) -> int:
        """Positions that one prompt takes."""
        return self.layout.rows

    # Forward

    def forward(
        self, context: Tensor, deep: Tensor | None, states: list[_LayerState] | None
    ) -> Tensor:
        """Run the layers without autograd.

        Args:
            context: as in `__call__`.
            deep: as in `__call__`.
            states: receives what `backward` needs, one entry per layer; None if no gradient is
                needed.

        Returns:
            Hidden states (N, C, d), float32.
        """
        n = context.shape[0]
        head = n * self.layout.tokens
        x = context.new_empty(n * self.layout.rows, self.layout.width)
        x[:head] = context.flatten(0, 1)
        x[head:].view(n, *self._suffix_BSd.shape)[:] = self._suffix_BSd
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            if deep is not None and 0 < i <= deep.shape[1]:
                x[:head] = deep[:, i - 1].flatten(0, 1)
            run = self._layer if i < last else self._last
            x = run(i, layer, x, n, states)
        return x.view(n, -1, self.layout.width)[:, self.layout.end_of_C]

    def _layer(
        self, i: int, layer: FrozenLayer, x: Tensor, n: int, states: list[_LayerState] | None
    ) -> Tensor:
        layout = self.layout
        head, tokens, bins, slots = n * layout.tokens, layout.tokens, layout.bins, layout.slots
        if i == 0:
            # The suffix tokens enter as constants, so their projections are copied.
            context_qkv, norm = layer.project(x[:head])
            qkv = context_qkv.new_empty(x.shape[0], 3 * layout.width)
            qkv[:head] = context_qkv
            qkv[head:].view(n, *self._suffix_qkv.shape)[:] = self._suffix_qkv
        else:
            qkv, norm = layer.project(x)
        context_parts = layout.split(qkv[:head], n, tokens)
        suffix_parts = layout.split(qkv[head:], n * bins, slots)
        context_kv = layout.prefix_kv(self._before_kv[i], context_parts[:, :, 1:])
        suffix_kv = layout.bin_kv(context_kv, suffix_parts[:, :, 1:])
        context_q = head_major(context_parts[:, :, :1])[0].mul_(layout.scale)
        suffix_q = head_major(suffix_parts[:, :, :1])[0].mul_(layout.scale)
        mixed = qkv.new_empty(x.shape[0], layout.width)
        out, context_state = attend(context_q, context_kv, layout.context_mask)
        layout.by_head(mixed[:head], n, tokens)[:] = out
        out, suffix_state = attend(suffix_q, suffix_kv, layout.mask)
        layout.by_head(mixed[head:], n * bins, slots)[:] = out
        x, mlp = layer.mlp(layer.add_attention(x, mixed))
        if states is not None:
            states.append(_LayerState(norm, suffix_state, context_state, mlp))
        return x

    def _last(
        self, i: int, layer: FrozenLayer, x: Tensor, n: int, states: list[_LayerState] | None
    ) -> Tensor:
        """The last layer at the end slots: (N * B * E, d)."""
        layout, head = self.layout, n * self.layout.tokens
        q_rows, kv_rows, norm = layer.project_few(x, lambda rows: layout.at_ends(rows, n))
        context = layout.split(kv_rows[:head], n, layout.tokens)
        suffix = layout.split(kv_rows[head:], n * layout.bins, layout.slots)
        kv = layout.bin_kv(layout.prefix_kv(self._before_kv[i], context), suffix)
        q = head_major(layout.split(q_rows, n * layout.bins, layout.ends))[0].mul_(layout.scale)
        out, state = attend(q, kv, layout.end_mask)
        mixed = out.transpose(1, 2).reshape(-1, layout.width)
        ends, mlp = layer.mlp(layer.add_attention(layout.at_ends(x, n), mixed))
        if states is not None:
            empty = x.new_empty(0)
            states.append(_LayerState(norm, state, AttentionState(*[empty] * 4), mlp))
        return ends

    def _constant_keys(self, before_Fd: Tensor) -> list[Tensor]:
        """Keys and values (2, h, F, e) of the special tokens in every layer."""
        layout = self.layout
        x, f = before_Fd, layout.first
        mask = additive(torch.ones(f, f, dtype=torch.bool).tril()).to(x.device)
        every_layer = []
        for layer in self.layers:
            qkv, _ = layer.project(x)
            q, *kv = layout.split(qkv, 1, f)[0].permute(1, 2, 0, 3)
            every_layer.append(torch.stack(kv))
            share = (q @ kv[0].transpose(-1, -2) * layout.scale + mask).softmax(-1)
            mixed = (share.to(self.dtype) @ kv[1]).transpose(0, 1).reshape(f, layout.width)
            x = layer.mlp(layer.add_attention(x, mixed))[0]
        return every_layer

    # Backward

    def backward(
        self, grad_NCd: Tensor, states: list[_LayerState], deep_layers: int
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the gradients of the prompts.

        Args:
            grad_NCd: gradient of `forward`'s result, float32.
            states: from `forward`.
            deep_layers: J.

        Returns:
            Gradients (N, M, d) of the context and (N, J, M, d) of the deep prompts, None where
            there are none.
        """
        layout, n = self.layout, grad_NCd.shape[0]
        head = n * layout.tokens
        grad = grad_NCd.new_zeros(n, layout.bins * layout.ends, layout.width)
        # Classes with equal names share an end slot; their gradients add up.
        grad.index_add_(1, layout.end_of_C, grad_NCd)
        grad = self._last_backward(self.layers[-1], grad.flatten(0, 1), states[-1], n)
        deep: list[Tensor] = []
        for i in range(len(self.layers) - 2, -1, -1):
            if 0 < i + 1 <= deep_layers:
                # Layer i + 1 discarded what layer i had made of the context.
                deep.append(grad[:head].view(n, layout.tokens, layout.width).clone())
                grad[:head] = 0
            grad = self._layer_backward(i, self.layers[i], grad, states[i], n)
        context = grad.view(n, layout.tokens, layout.width)
        return context, torch.stack(deep[::-1], dim=1) if deep else None

    def _layer_backward(
        self, i: int, layer: FrozenLayer, grad: Tensor, state: _LayerState, n: int
    ) -> Tensor:
        """Gradient of a layer's input; for the first layer that of the context rows alone."""
        layout = self.layout
        head, tokens, bins, slots = n * layout.tokens, layout.tokens, layout.bins, layout.slots
        grad = layer.mlp_backward(grad, state.mlp)
        d_mixed = layer.attention_backward(grad)
        d_out = layout.by_head(d_mixed[head:], n * bins, slots).contiguous()
        d_score = score_gradient(d_out, state.suffix)
        # The first layer's suffix projections are constants: only the prefix gets gradients there.
        keys = slice(layout.prefix) if i == 0 else slice(None)
        d_k, d_v = key_value_gradients(d_out, d_score, state.suffix, keys)
        rows = head if i == 0 else grad.shape[0]
        d_qkv = d_mixed.new_empty(rows, 3 * layout.width)
        if i > 0:
            layout.fill_gradients(
                layout.split(d_qkv[head:], n * bins, slots),
                d_score @ state.suffix.k,
                d_k[:, :, layout.prefix :],
                d_v[:, :, layout.prefix :],
            )
        d_out = layout.by_head(d_mixed[:head], n, tokens).contiguous()
        d_score = score_gradient(d_out, state.context)
        d_context_k, d_context_v = key_value_gradients(d_out, d_score, state.context)
        layout.fill_gradients(
            layout.split(d_qkv[:head], n, tokens),
            d_score @ state.context.k,
            d_context_k[:, :, layout.first :] + layout.to_context(d_k, n),
            d_context_v[:, :, layout.first :] + layout.to_context(d_v, n),
        )
        return layer.project_backward(d_qkv, state.norm).add_(grad[:rows])

    def _last_backward(
        self, layer: FrozenLayer, grad: Tensor, state: _LayerState, n: int
    ) -> Tensor:
        layout, head = self.layout, n * self.layout.tokens
        grad = layer.mlp_backward(grad, state.mlp)
        d_mixed = layer.attention_backward(grad)
        d_out = layout.by_head(d_mixed, n * layout.bins, layout.ends).contiguous()
        d_score = score_gradient(d_out, state.suffix)
        d_q = torch.empty_like(d_mixed)
        by_head = layout.by_head(d_q, n * layout.bins, layout.ends)
        torch.mul(d_score @ state.suffix.k, layout.scale, out=by_head)
        d_kv = d_mixed.new_empty(state.norm.x.shape[0], 2 * layout.width)
        d_context = layout.split(d_kv[:head], n, layout.tokens)
        d_suffix = layout.split(d_kv[head:], n * layout.bins, layout.slots)
        for j, grad_keys in enumerate(key_value_gradients(d_out, d_score, state.suffix)):
            d_context[:, :, j] = layout.to_context(grad_keys, n).transpose(1, 2)
            d_suffix[:, :, j] = grad_keys[:, :, layout.prefix :].transpose(1, 2)

        def add_at_ends(rows: Tensor, values: Tensor) -> None:
            layout.add_at_ends(rows, values, n)

        d_x = layer.project_few_backward(d_q, d_kv, state.norm, add_at_ends)
        # The residual connection of the last layer exists at the end slots only.
        layout.add_at_ends(d_x, grad, n)
        return d_x


class _Differentiable(torch.autograd.Function):
    """`PromptTransformer` with its own gradient."""

    @staticmethod
    def forward(
        ctx: Any, transformer: PromptTransformer, context: Tensor, deep: Tensor | None
    ) -> Tensor:
        states: list[_LayerState] = []
        out = transformer.forward(context, deep, states)
        ctx.transformer = transformer
        ctx.deep_layers = 0 if deep is None else deep.shape[1]
        # Not as an attribute of ctx: what is saved here is freed as soon as backward has run.
        ctx.save_for_backward(*(tensor for state in states for tensor in state.tensors()))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor | None]:
        flat = ctx.saved_tensors
        states = [_LayerState.of(flat[i : i + _TENSORS]) for i in range(0, len(flat), _TENSORS)]
        context, deep = ctx.transformer.backward(grad, states, ctx.deep_layers)
        return None, context, deep
