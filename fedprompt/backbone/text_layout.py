"""Where the rows of the fast text path lie, and how they become heads, keys and values.

`text_transformer.py` runs all prompts of all clients in one matrix. Its rows are first the N * M
context tokens, then the suffix slots, prompt by prompt and bin by bin. Keys and values of a bin are
those of its prompt's prefix, followed by its own slots.

Shape suffixes: N prompts, M context tokens, F special tokens before the context, P = F + M prefix
tokens, B bins of a prompt, S slots of a bin, E end slots of a bin, C classes, d width, h heads,
e = d / h, R = N * (M + B * S) rows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.packing import Packing
from fedprompt.backbone.text_attention import additive


class TextLayout:
    """Sizes, masks and views for one class list and one number of context tokens.

    Args:
        packing: where the suffix tokens lie.
        first: F.
        tokens: M.
        width: d.
        heads: h.
        device: where masks and indices are kept.
    """

    def __init__(
        self,
        packing: Packing,
        *,
        first: int,
        tokens: int,
        width: int,
        heads: int,
        device: torch.device,
    ) -> None:
        self.first, self.tokens, self.width, self.heads = first, tokens, width, heads
        self.bins, self.slots = packing.token_BS.shape
        self.prefix = first + tokens
        self.scale = 1 / math.sqrt(width // heads)
        ends_BE = packing.end_slot_BE
        self.ends = ends_BE.shape[1]
        # Index into a prompt's B * S slots of every end slot, and into these of every class.
        end_rows = (ends_BE + torch.arange(self.bins)[:, None] * self.slots).flatten()
        self._end_rows = end_rows.to(device)
        self.end_of_C = packing.end_of_C.to(device)
        sees = F.pad(packing.visible_BSS, (self.prefix, 0), value=True)
        sees_end = sees[torch.arange(self.bins)[:, None], ends_BE]
        context_sees = torch.ones(tokens, self.prefix, dtype=torch.bool).tril(first)
        # Of slots and of end slots (B, 1, S or E, P + S), and of context tokens (M, P).
        self.mask = additive(sees)[:, None].to(device)
        self.end_mask = additive(sees_end)[:, None].to(device)
        self.context_mask = additive(context_sees).to(device)

    @property
    def rows(self) -> int:
        """Rows that one prompt takes."""
        return self.tokens + self.bins * self.slots

    def split(self, rows: Tensor, batch: int, length: int) -> Tensor:
        """Split rows into sequences, parts and heads, as a view.

        Args:
            rows: (batch * length, parts * d), e.g. 3 parts: queries, keys and values.
            batch: number of sequences.
            length: positions of a sequence.

        Returns:
            (batch, length, parts, h, e).
        """
        # Not -1: there may be no rows.
        parts = rows.shape[-1] // self.width
        return rows.view(batch, length, parts, self.heads, self.width // self.heads)

    def by_head(self, rows: Tensor, batch: int, length: int) -> Tensor:
        """Split rows into sequences and heads, heads first, as a view.

        Args:
            rows: (batch * length, d).
            batch: number of sequences.
            length: positions of a sequence.

        Returns:
            (batch, h, length, e).
        """
        return rows.view(batch, length, self.heads, self.width // self.heads).transpose(1, 2)

    def prefix_kv(self, before: Tensor, context: Tensor) -> Tensor:
        """Keys and values (2, N, h, P, e) of a prompt's prefix.

        Args:
            before: (2, h, F, e) of the special tokens, the same for every prompt.
            context: (N, M, 2, h, e).
        """
        n = context.shape[0]
        kv = context.new_empty(2, n, self.heads, self.prefix, context.shape[-1])
        kv[:, :, :, : self.first] = before[:, None]
        kv[:, :, :, self.first :] = context.permute(2, 0, 3, 1, 4)
        return kv

    def bin_kv(self, prefix: Tensor, suffix: Tensor) -> Tensor:
        """Keys and values (2, N * B, h, P + S, e): the prompt's prefix before each bin's slots.

        Args:
            prefix: (2, N, h, P, e).
            suffix: (N * B, S, 2, h, e).
        """
        n, keys = prefix.shape[1], self.prefix + self.slots
        kv = suffix.new_empty(2, n * self.bins, self.heads, keys, suffix.shape[-1])
        kv.unflatten(1, (n, self.bins))[:, :, :, :, : self.prefix] = prefix[:, :, None]
        kv[:, :, :, self.prefix :] = suffix.permute(2, 0, 3, 1, 4)
        return kv

    def fill_gradients(self, target: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> None:
        """Write the gradients of queries, keys and values into one tensor.

        Args:
            target: (batch, length, 3, h, e), a view from `split`; every element is overwritten.
            d_q: (batch, h, length, e), gradient of the scaled queries.
            d_k: (batch, h, length, e).
            d_v: (batch, h, length, e).
        """
        # Attention was given scaled queries, so the scale multiplies their gradient.
        torch.mul(d_q.transpose(1, 2), self.scale, out=target[:, :, 0])
        target[:, :, 1] = d_k.transpose(1, 2)
        target[:, :, 2] = d_v.transpose(1, 2)

    def to_context(self, grad: Tensor, n: int) -> Tensor:
        """Gradients (N, h, M, e) of the context's keys or values, summed over bins.

        Args:
            grad: (N * B, h, P or P + S, e).
            n: N.
        """
        context = grad[:, :, self.first : self.prefix]
        return context.reshape(n, self.bins, *context.shape[1:]).sum(1)

    def at_ends(self, rows: Tensor, n: int) -> Tensor:
        """The end slots (N * B * E, d) of rows (R, d)."""
        suffix = rows[n * self.tokens :].view(n, -1, self.width)
        return suffix[:, self._end_rows].flatten(0, 1)

    def add_at_ends(self, rows: Tensor, values: Tensor, n: int) -> None:
        """Add values to the end slots of rows, in place.

        Args:
            rows: (R, d).
            values: (N * B * E, d).
            n: N.
        """
        # index_add_, because the padding of `end_slot_BE` names slot 0 several times.
        suffix = rows[n * self.tokens :].view(n, -1, self.width)
        suffix.index_add_(1, self._end_rows, values.view(n, -1, self.width))
