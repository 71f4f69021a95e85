"""The packed text path on a GPU: every bin is one sequence with a prefix of its own.

`text_transformer.py` computes each prompt's prefix once for all of its bins and writes its backward
pass out. That saves arithmetic and memory, which is what counts on a CPU, and takes about sixty
operations per layer. A GPU starts each of them as a kernel, and a local step of a usual block is
over before the last one has been started. Here every bin repeats the prefix, so that a layer is a
plain layer of equally long sequences with one mask: ten kernels forward and about eleven backward.
Bins are larger than on a CPU, so that the repeated prefixes are few percent of the rows.

Autograd records the layers (`frozen_layer.py`); their weights need no gradient, so it keeps little
more than a written-out backward pass would. Attention is PyTorch's fused one, which keeps no
scores. Values and gradients equal those of `text_transformer.py` up to float rounding
(`tests/backbone/test_text_bins.py`). Texts under low-rank adapters take this path on every device,
from the first adapted layer on (`lora_text.py`).

Shape suffixes: N prompts, M context tokens, J deep layers, d width, h heads, e = d / h, F special
tokens before the context, P = F + M prefix tokens, B bins of a prompt, S slots of a bin, L = P + S
positions of a sequence, X = N * B sequences, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.frozen_layer import FrozenLayer, RowLayer
from fedprompt.backbone.packing import Packing
from fedprompt.backbone.text_attention import additive, aligned


def prefers_bins(device: torch.device) -> bool:
    """Whether a device is better off with few large kernels than with little arithmetic."""
    return device.type != "cpu"


class BinTransformer:
    """A text tower without its last norm and projection, for one class list and context length.

    Args:
        layers: the tower's layers.
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
        self.layers, self.heads = tuple(layers), heads
        self._suffix_BSd, self._before_Fd = suffix_BSd, before_Fd
        self._first, prefix = len(before_Fd), len(before_Fd) + context_tokens
        self._bins, slots = packing.token_BS.shape
        self._prefix, self._length = prefix, prefix + slots
        device, dtype = suffix_BSd.device, self.layers[0].dtype
        sees = F.pad(packing.visible_BSS, (prefix, 0), value=True)
        ends_BE = packing.end_slot_BE
        bin_B1 = torch.arange(self._bins)[:, None]
        causal = torch.ones(prefix, self._length, dtype=torch.bool).tril()
        sees = torch.cat([causal.expand(self._bins, -1, -1), sees], dim=1)
        self._mask = aligned(additive(sees)[:, None].to(device, dtype))
        # The row of each class's end among a prompt's B * L.
        end_rows = (bin_B1 * self._length + prefix + ends_BE).flatten()
        self._end_row_C = end_rows[packing.end_of_C].to(device)
        self._masks: dict[int, Tensor] = {}

    @property
    def rows(self) -> int:
        """Positions that one prompt takes."""
        return self._bins * self._length

    def __call__(self, context: Tensor, deep: Tensor | None) -> Tensor:
        """Hidden states at the end-of-text tokens after the last layer.

        Args:
            context: (N, M, d) with positions, float32.
            deep: (N, J, M, d); entry j replaces the context at the input of layer j + 1.

        Returns:
            (N, C, d), float32.
        """
        x = self.embedded(context)
        return self.run(x, self.layers, context.shape[0], deep)

    def embedded(self, context: Tensor) -> Tensor:
        """Rows (N * B * L, d) at the input of the first layer, of contexts (N, M, d)."""
        n, bins = context.shape[0], self._bins
        parts = [
            self._before_Fd.expand(n, bins, -1, -1),
            context[:, None].expand(-1, bins, -1, -1),
            self._suffix_BSd.expand(n, -1, -1, -1),
        ]
        return torch.cat(parts, dim=2).flatten(0, 2)

    def run(
        self,
        x: Tensor,
        layers: Sequence[RowLayer],
        n: int,
        deep: Tensor | None = None,
    ) -> Tensor:
        """Run layers up to the tower's last one.

        Args:
            x: rows (N * B * L, d) at the input of the first of `layers`.
            layers: the tower's last layers.
            n: N.
            deep: as in `__call__`.

        Returns:
            Hidden states (N, C, d) at the end-of-text tokens after the last layer, float32.
        """
        mask, first = self._mask_of(n), len(self.layers) - len(layers)
        for i, layer in enumerate(layers, first):
            if deep is not None and 0 < i <= deep.shape[1]:
                x = self._replaced(x, deep[:, i - 1])
            x = self._attended(x, layer, mask)
            if i == len(self.layers) - 1:
                # Nobody reads the other positions of the last layer.
                x = x.view(n, self.rows, -1).index_select(1, self._end_row_C).flatten(0, 1)
            x = layer.mlp(x)[0]
        return x.view(n, -1, x.shape[-1])

    @torch.no_grad()
    def constant_input(self, layer: int) -> Tensor:
        """Rows (B * L, d) at the input of a layer where nothing is learned: M = 0, N = 1."""
        x = self.embedded(self._suffix_BSd.new_zeros(1, 0, self._suffix_BSd.shape[-1]))
        for frozen in self.layers[:layer]:
            x = frozen.mlp(self._attended(x, frozen, self._mask))[0]
        return x

    def _attended(self, x: Tensor, layer: RowLayer, mask: Tensor) -> Tensor:
        return layer.add_attention(x, self._attend(layer.project(x)[0], mask))

    def _attend(self, qkv: Tensor, mask: Tensor) -> Tensor:
        """Mixed values as rows (X * L, d), of queries, keys and values (X * L, 3 d)."""
        parts = qkv.view(-1, self._length, 3, self.heads, qkv.shape[-1] // 3 // self.heads)
        q, k, v = (part.transpose(1, 2) for part in parts.unbind(2))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    def _replaced(self, x: Tensor, deep_NMd: Tensor) -> Tensor:
        """Rows with a deep prompt in place of the context, in every bin."""
        x_NBLd = x.view(len(deep_NMd), self._bins, self._length, -1)
        deep_NBMd = deep_NMd[:, None].expand(-1, self._bins, -1, -1)
        parts = [x_NBLd[:, :, : self._first], deep_NBMd, x_NBLd[:, :, self._prefix :]]
        return torch.cat(parts, dim=2).flatten(0, 2)

    def _mask_of(self, n: int) -> Tensor:
        """The mask (X, 1, L, L) of N prompts; that of the last N is kept."""
        if self._bins == 1:
            return self._mask
        if n not in self._masks:
            self._masks = {n: aligned(self._mask.repeat(n, 1, 1, 1))}
        return self._masks[n]
