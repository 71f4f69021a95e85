"""Masked attention with its gradient, for the fast text path (`text_transformer.py`).

It is written out, and not PyTorch's fused attention, because its backward pass is then free to skip
the gradient of constant keys, and because one additive mask per bin serves all prompts.

Shape suffixes: X sequences, h heads, t queries, s keys, e = width / h.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_ALIGNED = 8
"""Fused attention copies a mask in every call, unless its rows begin at multiples of this."""


class AttentionState(NamedTuple):
    """What the backward pass of an attention needs.

    Attributes:
        q: queries (X, h, t, e), scaled by 1 / sqrt(e).
        k: keys (X, h, s, e).
        v: values (X, h, s, e).
        share: float32 (X, h, t, s), how much of every value each query takes; rows sum to 1.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    share: Tensor


def attend(q: Tensor, kv: Tensor, mask: Tensor) -> tuple[Tensor, AttentionState]:
    """Attention of scaled queries.

    Args:
        q: (X, h, t, e), already scaled: one pass over the queries instead of the larger scores.
        kv: (2, X, h, s, e).
        mask: (t, s), or (B, 1, t, s) for sequences that are B bins of each prompt in turn; 0 where
            a query may look, minus infinity elsewhere.

    Returns:
        Mixed values (X, h, t, e), and what the backward pass needs.
    """
    scores = q @ kv[0].transpose(-1, -2)
    # A mask of B bins broadcasts over prompts; the sequences lie prompt by prompt.
    bins = mask.shape[:-3]
    scores.view(len(scores) // math.prod(bins), *bins, *scores.shape[1:]).add_(mask)
    share = scores.softmax(-1, dtype=torch.float32)
    return share.to(q.dtype) @ kv[1], AttentionState(q, kv[0], kv[1], share)


def score_gradient(d_out: Tensor, state: AttentionState) -> Tensor:
    """Gradient (X, h, t, s) of the scores before the softmax, from that of the mixed values."""
    d_share = (d_out @ state.v.transpose(-1, -2)).float()
    d_score: Tensor = torch.ops.aten._softmax_backward_data(d_share, state.share, -1, torch.float32)
    return d_score.to(d_out.dtype)


def key_value_gradients(
    d_out: Tensor, d_score: Tensor, state: AttentionState, keys: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of keys and values.

    Args:
        d_out: gradient (X, h, t, e) of the mixed values.
        d_score: gradient (X, h, t, s) of the scores, from `score_gradient`.
        state: from `attend`.
        keys: the keys that need a gradient; all by default.

    Returns:
        Gradients (X, h, s, e) of the keys and of the values.
    """
    d_k = d_score[..., keys].transpose(-1, -2) @ state.q
    d_v = state.share[..., keys].to(d_out.dtype).transpose(-1, -2) @ d_out
    return d_k, d_v


def additive(sees: Tensor) -> Tensor:
    """A mask to add to scores: 0 where `sees` is true, minus infinity elsewhere."""
    return torch.zeros(sees.shape).masked_fill_(~sees, -math.inf)


def aligned(mask: Tensor) -> Tensor:
    """The same mask, as a view of a wider one, for PyTorch's fused attention."""
    length = mask.shape[-1]
    return F.pad(mask, (0, -length % _ALIGNED))[..., :length]


def head_major(parts: Tensor) -> Tensor:
    """(X, t, parts, h, e) -> (parts, X, h, t, e), a copy, so that products read it in order."""
    return parts.permute(2, 0, 3, 1, 4).clone(memory_format=torch.contiguous_format)
