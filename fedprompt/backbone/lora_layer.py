"""A frozen transformer block with low-rank additions to its matrix products, for K clients at once.

Source: LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., ICLR 2022, arXiv 2106.09685):
a product W x becomes W x + s B A x, with A (r, inputs) and B (outputs, r) learned and W frozen.

`lora_text.py` and `lora_image.py` run the towers through these blocks. The clients of a block have
factors of their own, so the rows of all clients go through the frozen product together, and each
client's rows through two thin batched products; no weight is ever changed or copied. Autograd
records the block. Beside what a frozen block keeps, it keeps the input of every product with an
addition, which the gradient of A needs.

The products have the names that the library peft gives them in Hugging Face's CLIP. A layer scale
is part of a frozen weight here (`FrozenLayer`), so an addition stands behind it.

Shape suffixes: K clients, R rows of a client, L layers with additions, d width, r rank, i inputs
and o outputs of a product, s ranks of a group together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.frozen_layer import FrozenLayer
from fedprompt.backbone.matrices import linear

GROUPS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "out": ("out_proj",),
    "up": ("fc1",),
    "down": ("fc2",),
}
"""The products of a block that take additions, by the frozen product that computes them."""
TARGETS = tuple(name for names in GROUPS.values() for name in names)

Pair = tuple[Tensor, Tensor]
"""Factors A (K, L, r, i) and B (K, L, o, r); either client axis may be 1."""
Additions = Mapping[str, Pair]
"""By group, factors (K, L, s, i) and (K, L, o, s)."""


def product_shape(target: str, layer: FrozenLayer) -> tuple[int, int]:
    """Outputs and inputs of one of the products `TARGETS`."""
    width, hidden = layer.out[0].shape[0], layer.up[0].shape[0]
    return {"fc1": (hidden, width), "fc2": (width, hidden)}.get(target, (width, width))


def grouped(pairs: Mapping[str, Sequence[Pair]]) -> dict[str, Pair]:
    """Join the factors of products that the blocks compute together.

    Args:
        pairs: by product, the factors of every adapter; their additions are summed. A scale is part
            of B.

    Returns:
        By group, factors whose addition is that of all products and adapters.
    """
    return {
        group: _joined([pairs.get(name, ()) for name in names])
        for group, names in GROUPS.items()
        if any(name in pairs for name in names)
    }


def _joined(products: Sequence[Sequence[Pair]]) -> Pair:
    """A on top of each other, and B as blocks, each at the outputs of its product."""
    every = [pair for pairs in products for pair in pairs]
    clients = max(len(factor) for pair in every for factor in pair)
    total = sum(b.shape[-1] for _, b in every)
    down_KLsi = torch.cat([a.expand(clients, -1, -1, -1) for a, _ in every], dim=-2)
    like = every[0][1].expand(clients, -1, -1, -1)
    rows, start = [], 0
    for pairs in products:
        if not pairs:
            rows.append(like.new_zeros(*like.shape[:-1], total))
            continue
        b_KLor = torch.cat([b.expand(clients, -1, -1, -1) for _, b in pairs], dim=-1)
        end = start + b_KLor.shape[-1]
        rows.append(F.pad(b_KLor, (start, total - end)))
        start = end
    return down_KLsi, torch.cat(rows, dim=-2)


def with_additions(layers: Sequence[FrozenLayer], additions: Additions) -> list[LoraLayer]:
    """The last L of a tower's layers with each client's additions."""
    count = next(iter(additions.values()))[0].shape[1]
    first = len(layers) - count
    return [
        LoraLayer(layer, {g: (a[:, j], b[:, j]) for g, (a, b) in additions.items()})
        for j, layer in enumerate(layers[first:])
    ]


def clients_of(additions: Additions) -> int:
    """K."""
    return max(len(factor) for pair in additions.values() for factor in pair)


class LoraLayer:
    """A `RowLayer` whose rows are K * R, client by client.

    Args:
        layer: the frozen block.
        additions: by group, A (K, s, i) and B (K, o, s), float32.
    """

    def __init__(self, layer: FrozenLayer, additions: Mapping[str, Pair]) -> None:
        self.layer, self.dtype = layer, layer.qkv[0].dtype
        clients = clients_of(additions)
        self.additions = {
            group: tuple(t.to(self.dtype).expand(clients, -1, -1) for t in pair)
            for group, pair in additions.items()
        }
        # `expand` multiplies by the activation's slope, which may also be part of the weights.
        self._slope = (layer.slope or 1.0) * layer.folded

    def project(self, x: Tensor) -> tuple[Tensor, None]:
        """As `RowLayer` says."""
        normed = self.layer.norm_1.forward(x)[0].to(self.dtype)
        return self._plus(linear(normed, *self.layer.qkv), normed, "qkv"), None

    def add_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        """As `RowLayer` says."""
        return self._plus(self.layer.add_attention(x, mixed), mixed, "out")

    def mlp(self, x: Tensor) -> tuple[Tensor, None]:
        """As `RowLayer` says."""
        normed = self.layer.norm_2.forward(x)[0].to(self.dtype)
        hidden = self._plus(self.layer.expand(normed), normed, "up", self._slope)
        active, scale = self.layer.activate(hidden)
        out = self.layer.add_mlp(x, active, scale)
        return self._plus(out, active, "down", 1 / self._slope), None

    def _plus(self, y: Tensor, x: Tensor, group: str, scale: float = 1.0) -> Tensor:
        """y + scale * B A x, each client's rows with its own factors."""
        if group not in self.additions:
            return y
        a_Ksi, b_Kos = self.additions[group]
        thin_KRs = x.view(len(a_Ksi), -1, x.shape[-1]) @ a_Ksi.transpose(-1, -2)
        y_KRo, b_Kso = y.view(len(a_Ksi), -1, y.shape[-1]), b_Kos.transpose(-1, -2)
        if y.dtype == self.dtype:
            # One kernel adds while it multiplies.
            return torch.baddbmm(y_KRo, thin_KRs, b_Kso, alpha=scale).flatten(0, 1)
        return (y_KRo + scale * (thin_KRs @ b_Kso)).flatten(0, 1)
