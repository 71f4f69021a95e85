"""A frozen causal transformer over learned contexts and constant suffixes, forward and backward.

Autograd would keep what only weight gradients need, fill whole tensors with zeros for every slice,
and add them up. Here both directions are written down instead: what is kept is what the gradient of
the context needs, and nearly all time goes into matrix products of all clients' tokens at once
(`scripts/bench.py limit` tells how nearly). The mathematics is that of the blocks in
`fedprompt/bench/reference.py`; `tests/backbone/test_text_tower.py` compares values and gradients.

What is constant is computed once: keys and values of the special tokens before the context in every
layer (they see nothing else), and the first layer's projections of the suffix tokens. The last
layer runs at the end-of-text tokens only.

Rows of a hidden state: first the N * M context tokens, then the suffix slots, prompt by prompt and
bin by bin. Shape suffixes: N prompts, M context tokens, J deep layers, d width, h heads, e = d / h,
P prefix tokens (special tokens and context), B bins of a prompt, S slots of a bin, E end slots of
a bin, C classes, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.frozen_layer import FrozenLayer, add_product
from fedprompt.backbone.packing import Packing


class _Kept(NamedTuple):
    """What one layer's backward needs; of the last layer, x_1 and below are of end rows."""

    x: Tensor
    mean_1: Tensor
    rstd_1: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    share: Tensor
    own_q: Tensor
    own_k: Tensor
    own_v: Tensor
    own_share: Tensor
    x_1: Tensor
    mean_2: Tensor
    rstd_2: Tensor
    hidden: Tensor


class PromptTransformer:
    """All but the last norm and projection of a text tower, for one class list and context length.

    Args:
        layers: at least two.
        packing: where the suffix tokens lie.
        suffix_BSd: their embeddings with positions.
        before_Fd: embeddings with positions of the F special tokens before the context.
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
        self.heads, self.tokens = heads, context_tokens
        self.bins, self.slots, self.width = suffix_BSd.shape
        self.first = before_Fd.shape[0]
        self.prefix = self.first + context_tokens
        self.dtype = self.layers[0].qkv[0].dtype
        device = suffix_BSd.device
        self._suffix_BSd = suffix_BSd
        ends = packing.end_slot_BE
        self.ends = ends.shape[1]
        # Index into a prompt's B * S slots of every end slot, and into these of every class.
        self._end_rows = (ends + torch.arange(self.bins)[:, None] * self.slots).flatten().to(device)
        self._end_of_C = packing.end_of_C.to(device)
        sees = F.pad(packing.visible_BSS, (self.prefix, 0), value=True)
        sees_end = sees[torch.arange(self.bins)[:, None], ends]
        context_sees = torch.ones(self.tokens, self.prefix, dtype=torch.bool).tril(self.first)
        # (B, 1, S or E, P + S) and (M, P): 0 where a token looks, minus infinity elsewhere.
        self._mask = _additive(sees)[:, None].to(device)
        self._end_mask = _additive(sees_end)[:, None].to(device)
        self._context_mask = _additive(context_sees).to(device)
        with torch.no_grad():
            self._before_kv = self._constant_keys(before_Fd)
            layer = self.layers[0]
            normed = layer.norm_1.forward(suffix_BSd)[0].to(self.dtype)
            self._suffix_qkv = F.linear(normed, *layer.qkv).flatten(0, 1)

    @property
    def rows(self) -> int:
        """Rows that one prompt takes."""
        return self.tokens + self.bins * self.slots

    def __call__(self, context: Tensor, deep: Tensor | None) -> Tensor:
        """Hidden states (N, C, d) at the end-of-text tokens after the last layer, float32.

        Args:
            context: (N, M, d) with positions, float32.
            deep: (N, J, M, d); entry j replaces the context at the input of layer j + 1.
        """
        wants_grad = context.requires_grad or (deep is not None and deep.requires_grad)
        if torch.is_grad_enabled() and wants_grad:
            out: Tensor = _Differentiable.apply(self, context, deep)
            return out
        with torch.no_grad():
            return self.forward(context, deep, None)

    # Forward

    def forward(self, context: Tensor, deep: Tensor | None, kept: list[_Kept] | None) -> Tensor:
        """As `__call__`; fills `kept` for `backward` where it is a list."""
        n = context.shape[0]
        head = n * self.tokens
        x = context.new_empty(n * self.rows, self.width)
        x[:head] = context.flatten(0, 1)
        x[head:].view(n, *self._suffix_BSd.shape)[:] = self._suffix_BSd
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            if deep is not None and 0 < i <= deep.shape[1]:
                x[:head] = deep[:, i - 1].flatten(0, 1)
            x = self._layer(i, layer, x, n, kept) if i < last else self._last(layer, x, n, kept)
        return x.view(n, -1, self.width)[:, self._end_of_C]

    def _layer(
        self, i: int, layer: FrozenLayer, x: Tensor, n: int, kept: list[_Kept] | None
    ) -> Tensor:
        head = n * self.tokens
        if i == 0:
            normed, mean, rstd = layer.norm_1.forward(x[:head])
            qkv = normed.new_empty(x.shape[0], 3 * self.width, dtype=self.dtype)
            qkv[:head] = F.linear(normed.to(self.dtype), *layer.qkv)
            qkv[head:].view(n, *self._suffix_qkv.shape)[:] = self._suffix_qkv
        else:
            normed, mean, rstd = layer.norm_1.forward(x)
            qkv = F.linear(normed.to(self.dtype), *layer.qkv)
        own = self._split(qkv[:head], n, self.tokens)
        own_q, own_kv = _head_major(own[:, :, :1]), self._prefix_kv(i, own[:, :, 1:])
        suffix = self._split(qkv[head:], n * self.bins, self.slots)
        q, kv = _head_major(suffix[:, :, :1]), self._with_prefix(own_kv, suffix[:, :, 1:])
        own_q, q = self._scaled(own_q[0]), self._scaled(q[0])
        mixed = qkv.new_empty(x.shape[0], self.width)
        out, own_share = self._attend(own_q, own_kv, self._context_mask)
        self._heads(mixed[:head], n, self.tokens)[:] = out
        out, share = self._attend(q, kv, self._mask)
        self._heads(mixed[head:], n * self.bins, self.slots)[:] = out
        x_1 = add_product(x, mixed, layer.out)
        x_2, mean_2, rstd_2, hidden = layer.mlp(x_1)
        if kept is not None:
            suffix_parts = (q, kv[0], kv[1], share)
            own_parts = (own_q, own_kv[0], own_kv[1], own_share)
            up_to = (x, mean, rstd, *suffix_parts, *own_parts)
            kept.append(_Kept(*up_to, x_1, mean_2, rstd_2, hidden))
        return x_2

    def _last(self, layer: FrozenLayer, x: Tensor, n: int, kept: list[_Kept] | None) -> Tensor:
        """The last layer at the end slots: (N * B * E, d)."""
        head, d = n * self.tokens, self.width
        weight, bias = layer.qkv
        normed, mean, rstd = layer.norm_1.forward(x)
        normed = normed.to(self.dtype)
        kv_rows = F.linear(normed, weight[d:], bias[d:])
        q_rows = F.linear(self._at_ends(normed, n), weight[:d], bias[:d])
        own = kv_rows[:head].view(n, self.tokens, 2, self.heads, -1)
        suffix = kv_rows[head:].view(n * self.bins, self.slots, 2, self.heads, -1)
        own_kv = self._prefix_kv(len(self.layers) - 1, own)
        kv = self._with_prefix(own_kv, suffix)
        q = self._scaled(_head_major(q_rows.view(n * self.bins, self.ends, 1, self.heads, -1))[0])
        out, share = self._attend(q, kv, self._end_mask)
        x_1 = add_product(self._at_ends(x, n), out.transpose(1, 2).reshape(-1, d), layer.out)
        x_2, mean_2, rstd_2, hidden = layer.mlp(x_1)
        if kept is not None:
            none = x.new_empty(0)
            up_to = (x, mean, rstd, q, kv[0], kv[1], share, none, none, none, none)
            kept.append(_Kept(*up_to, x_1, mean_2, rstd_2, hidden))
        return x_2

    def _attend(self, q: Tensor, kv: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Attention (b, h, t, e) of scaled queries, and the shares (b, h, t, keys) it gives."""
        scores = q @ kv[0].transpose(-1, -2)
        # A mask of B bins broadcasts over prompts; the batch axis is prompt by prompt.
        scores.view(-1, *mask.shape[:-3], *scores.shape[1:]).add_(mask)
        share = scores.softmax(-1, dtype=torch.float32)
        return share.to(q.dtype) @ kv[1], share

    # Backward

    def backward(
        self, grad_NCd: Tensor, kept: list[_Kept], deep_layers: int
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of the context and of the deep prompts (None where there are none)."""
        n = grad_NCd.shape[0]
        head = n * self.tokens
        grad = grad_NCd.new_zeros(n, self.bins * self.ends, self.width)
        grad.index_add_(1, self._end_of_C, grad_NCd)
        grad = self._last_backward(self.layers[-1], grad.flatten(0, 1), kept[-1], n)
        deep: list[Tensor] = []
        for i in range(len(self.layers) - 2, -1, -1):
            if 0 < i + 1 <= deep_layers:
                deep.append(grad[:head].view(n, self.tokens, self.width).clone())
                grad[:head] = 0
            grad = self._layer_backward(i, self.layers[i], grad, kept[i], n)
        context = grad.view(n, self.tokens, self.width)
        return context, torch.stack(deep[::-1], dim=1) if deep else None

    def _layer_backward(
        self, i: int, layer: FrozenLayer, grad: Tensor, kept: _Kept, n: int
    ) -> Tensor:
        """Gradient of a layer's input; of the first layer's, the context rows alone."""
        head = n * self.tokens
        grad = layer.mlp_backward(grad, kept.x_1, kept.mean_2, kept.rstd_2, kept.hidden)
        d_mixed = grad.to(self.dtype) @ layer.out[0]
        d_out = self._heads(d_mixed[head:], n * self.bins, self.slots).contiguous()
        d_score = _score_gradient(d_out, kept.v, kept.share)
        # The first layer's suffix projections are constants: only the prefix gets gradients there.
        keys = slice(self.prefix) if i == 0 else slice(None)
        d_k = d_score[..., keys].transpose(-1, -2) @ kept.q
        d_v = kept.share[..., keys].to(self.dtype).transpose(-1, -2) @ d_out
        rows = head if i == 0 else grad.shape[0]
        d_qkv = d_mixed.new_empty(rows, 3 * self.width)
        if i > 0:
            d_suffix = self._split(d_qkv[head:], n * self.bins, self.slots)
            self._fill(
                d_suffix, d_score @ kept.k, d_k[:, :, self.prefix :], d_v[:, :, self.prefix :]
            )
        d_own_out = self._heads(d_mixed[:head], n, self.tokens).contiguous()
        d_own_score = _score_gradient(d_own_out, kept.own_v, kept.own_share)
        d_own_k = d_own_score.transpose(-1, -2) @ kept.own_q
        d_own_v = kept.own_share.to(self.dtype).transpose(-1, -2) @ d_own_out
        self._fill(
            self._split(d_qkv[:head], n, self.tokens),
            d_own_score @ kept.own_k,
            d_own_k[:, :, self.first :] + self._to_context(d_k, n),
            d_own_v[:, :, self.first :] + self._to_context(d_v, n),
        )
        d_normed = (d_qkv @ layer.qkv[0]).float()
        d_x = layer.norm_1.backward(d_normed, kept.x[:rows], kept.mean_1, kept.rstd_1)
        return d_x.add_(grad[:rows])

    def _last_backward(self, layer: FrozenLayer, grad: Tensor, kept: _Kept, n: int) -> Tensor:
        head, d = n * self.tokens, self.width
        weight = layer.qkv[0]
        grad = layer.mlp_backward(grad, kept.x_1, kept.mean_2, kept.rstd_2, kept.hidden)
        d_mixed = grad.to(self.dtype) @ layer.out[0]
        d_out = self._heads(d_mixed, n * self.bins, self.ends).contiguous()
        d_score = _score_gradient(d_out, kept.v, kept.share)
        d_k = d_score.transpose(-1, -2) @ kept.q
        d_v = kept.share.to(self.dtype).transpose(-1, -2) @ d_out
        d_q = torch.empty_like(d_mixed)
        torch.mul(d_score @ kept.k, self._scale, out=self._heads(d_q, n * self.bins, self.ends))
        d_kv = d_mixed.new_empty(kept.x.shape[0], 2 * d)
        d_own = d_kv[:head].view(n, self.tokens, 2, self.heads, -1)
        d_suffix = d_kv[head:].view(n * self.bins, self.slots, 2, self.heads, -1)
        for j, t in enumerate((d_k, d_v)):
            d_own[:, :, j] = self._to_context(t, n).transpose(1, 2)
            d_suffix[:, :, j] = t[:, :, self.prefix :].transpose(1, 2)
        d_normed = (d_kv @ weight[d:]).float()
        self._add_at_ends(d_normed, (d_q @ weight[:d]).float(), n)
        d_x = layer.norm_1.backward(d_normed, kept.x, kept.mean_1, kept.rstd_1)
        self._add_at_ends(d_x, grad, n)
        return d_x

    # Rows and heads

    @property
    def _scale(self) -> float:
        return 1 / math.sqrt(self.width // self.heads)

    def _scaled(self, q: Tensor) -> Tensor:
        return q.mul_(self._scale)

    def _split(self, rows: Tensor, batch: int, length: int) -> Tensor:
        """(batch * length, 3 d) -> (batch, length, 3, h, e)."""
        return rows.view(batch, length, 3, self.heads, -1)

    def _heads(self, rows: Tensor, batch: int, length: int) -> Tensor:
        """(batch * length, d) -> (batch, h, length, e), a view."""
        return rows.view(batch, length, self.heads, -1).transpose(1, 2)

    def _fill(self, target: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> None:
        """Gradients by head into (batch, length, 3, h, e)."""
        torch.mul(d_q.transpose(1, 2), self._scale, out=target[:, :, 0])
        target[:, :, 1] = d_k.transpose(1, 2)
        target[:, :, 2] = d_v.transpose(1, 2)

    def _prefix_kv(self, i: int, own: Tensor) -> Tensor:
        """Keys and values (2, N, h, P, e) of special tokens and context (N, M, 2, h, e)."""
        n = own.shape[0]
        kv = own.new_empty(2, n, self.heads, self.prefix, own.shape[-1])
        kv[:, :, :, : self.first] = self._before_kv[i][:, None]
        kv[:, :, :, self.first :] = own.permute(2, 0, 3, 1, 4)
        return kv

    def _with_prefix(self, prefix: Tensor, suffix: Tensor) -> Tensor:
        """Keys and values (2, N * B, h, P + S, e): the prompt's prefix before each bin's own."""
        n, keys = prefix.shape[1], self.prefix + self.slots
        kv = suffix.new_empty(2, n * self.bins, self.heads, keys, suffix.shape[-1])
        kv.unflatten(1, (n, self.bins))[:, :, :, :, : self.prefix] = prefix[:, :, None]
        kv[:, :, :, self.prefix :] = suffix.permute(2, 0, 3, 1, 4)
        return kv

    def _to_context(self, grad: Tensor, n: int) -> Tensor:
        """Key or value gradients (N * B, h, keys, e) of the context, summed over bins."""
        own = grad[:, :, self.first : self.prefix]
        return own.reshape(n, self.bins, *own.shape[1:]).sum(1)

    def _at_ends(self, rows: Tensor, n: int) -> Tensor:
        """End slots of (R, d): (N * B * E, d)."""
        suffix = rows[n * self.tokens :].view(n, -1, self.width)
        return suffix[:, self._end_rows].flatten(0, 1)

    def _add_at_ends(self, rows: Tensor, values: Tensor, n: int) -> None:
        suffix = rows[n * self.tokens :].view(n, -1, self.width)
        suffix.index_add_(1, self._end_rows, values.view(n, -1, self.width))

    def _constant_keys(self, before_Fd: Tensor) -> list[Tensor]:
        """Keys and values (2, h, F, e) of the special tokens in every layer."""
        x, f, d = before_Fd, self.first, self.width
        mask = _additive(torch.ones(f, f, dtype=torch.bool).tril()).to(x.device)
        found = []
        for layer in self.layers:
            normed = layer.norm_1.forward(x)[0].to(self.dtype)
            q, *kv = F.linear(normed, *layer.qkv).view(f, 3, self.heads, -1).permute(1, 2, 0, 3)
            found.append(torch.stack(kv))
            share = (q @ kv[0].transpose(-1, -2) * self._scale + mask).softmax(-1)
            mixed = (share.to(self.dtype) @ kv[1]).transpose(0, 1).reshape(f, d)
            x = layer.mlp(add_product(x, mixed, layer.out))[0]
        return found


def _additive(sees: Tensor) -> Tensor:
    return torch.zeros(sees.shape).masked_fill_(~sees, -math.inf)


def _head_major(parts: Tensor) -> Tensor:
    """(batch, length, parts, h, e) -> (parts, batch, h, length, e), a copy."""
    return parts.permute(2, 0, 3, 1, 4).clone(memory_format=torch.contiguous_format)


def _score_gradient(d_out: Tensor, v: Tensor, share: Tensor) -> Tensor:
    """Gradient of the scores before the softmax; queries were scaled already."""
    d_share = (d_out @ v.transpose(-1, -2)).float()
    d_score: Tensor = torch.ops.aten._softmax_backward_data(d_share, share, -1, torch.float32)
    return d_score.to(d_out.dtype)


class _Differentiable(torch.autograd.Function):
    """`PromptTransformer` with its written-down gradient."""

    @staticmethod
    def forward(
        ctx: Any, transformer: PromptTransformer, context: Tensor, deep: Tensor | None
    ) -> Tensor:
        kept: list[_Kept] = []
        out = transformer.forward(context, deep, kept)
        ctx.transformer = transformer
        ctx.deep_layers = 0 if deep is None else deep.shape[1]
        ctx.save_for_backward(*(tensor for layer in kept for tensor in layer))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor | None]:
        fields, flat = len(_Kept._fields), ctx.saved_tensors
        kept = [_Kept(*flat[i : i + fields]) for i in range(0, len(flat), fields)]
        context, deep = ctx.transformer.backward(grad, kept, ctx.deep_layers)
        return None, context, deep
