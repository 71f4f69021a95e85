"""A frozen causal transformer over prompts of which every class has a sequence of its own.

`text_tower.py` calls it where classes share no hidden states but that of `[SOS]`: contexts of their
own, names before or within the context, and adapters. Compared with the usual pass

- a sequence ends at its end-of-text token, since nothing later is looked at;
- sequences of all lengths run through the matrix products together, without padding, and only the
  attention takes one length after the other;
- the last layer runs at the end-of-text tokens only.

Autograd records the layers (`frozen_layer.py`). Their weights need no gradient, so it keeps little
more than a written-out backward pass would: the inputs of the norms, queries, keys, values and the
pre-activations of the MLP. `checkpointed` bounds that for long class lists.

Shape suffixes: N prompts, G classes of a group whose sequences are equally long, L positions of
such a sequence, C classes, M context tokens, J deep layers, d width, h heads, e = d / h, R rows
(positions of all sequences, flattened group by group).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fedprompt.backbone.frozen_layer import FrozenLayer

Adapt = Callable[[int, Any, Tensor], Tensor | None]
"""From a layer's number, its block and its input (N, G, L, d) to what is added to its output, or
None. It treats every position by itself. Where N is 1 in the input, it may be larger in the
result."""
Group = tuple[Tensor, Tensor]
"""Embeddings with positions (N, G, L, d), and the positions (G, M) of the context."""

BYTES_AT_ONCE = {"cpu": 2**30, "cuda": 2**34}
"""Activations that are kept for a gradient at a time. Beyond it, the gradient computes one chunk of
classes after the other again."""
BYTES_PER_UNIT = 64
"""Bytes of activations per position, layer and unit of width: about 14 float32 numbers, rounded
up."""


class SequenceTransformer:
    """A text tower without its last norm and projection.

    Args:
        layers: the tower's layers.
        blocks: open_clip's blocks of the same layers, for adapters.
        heads: h.
    """

    def __init__(self, layers: Sequence[FrozenLayer], blocks: Sequence[Any], heads: int) -> None:
        self.layers, self.blocks, self.heads = tuple(layers), tuple(blocks), heads

    def __call__(
        self, groups: Sequence[Group], deep_NJMd: Tensor | None, adapt: Adapt | None
    ) -> Tensor:
        """Hidden states at the last position of every sequence after the last layer.

        Args:
            groups: one per length of sequences.
            deep_NJMd: entry j replaces the context at the input of layer j + 1.
            adapt: adds to the output of layers.

        Returns:
            (N, C, d), float32, classes in the order of the groups.
        """
        # The shapes (N, G, L) of the groups in the rows of x.
        shapes = [x.shape[:3] for x, _ in groups]
        x = torch.cat([x.flatten(0, 2) for x, _ in groups])
        last = len(self.layers) - 1
        for i, (layer, block) in enumerate(zip(self.layers, self.blocks, strict=True)):
            if deep_NJMd is not None and 0 < i <= deep_NJMd.shape[1]:
                x = _replaced(x, groups, deep_NJMd[:, i - 1])
            inputs = _parts(x, shapes)
            if i == last:
                # Nobody reads the other positions of the last layer.
                inputs = [part[:, :, -1:] for part in inputs]
                x = self._last(layer, x, shapes)
                shapes = [part.shape[:3] for part in inputs]
            else:
                x = self._layer(layer, x, shapes)
            if adapt is not None:
                x, shapes = _with_added(
                    _parts(x, shapes), [adapt(i, block, part) for part in inputs]
                )
        return torch.cat([part.squeeze(2) for part in _parts(x, shapes)], dim=1)

    def _layer(self, layer: FrozenLayer, x: Tensor, shapes: Sequence[torch.Size]) -> Tensor:
        qkv, _ = layer.project(x)
        mixed = [
            self._attend(*part.unbind(-2), causal=True) for part in self._heads(qkv, shapes, 3)
        ]
        return layer.mlp(layer.add_attention(x, torch.cat(mixed)))[0]

    def _last(self, layer: FrozenLayer, x: Tensor, shapes: Sequence[torch.Size]) -> Tensor:
        """The last layer at the last positions: (N * C, d), group by group."""

        def at_ends(rows: Tensor) -> Tensor:
            return torch.cat([p[:, :, -1].flatten(0, 1) for p in _parts(rows, shapes)])

        q, kv, _ = layer.project_few(x, at_ends)
        ends = [torch.Size((n, g, 1)) for n, g, _ in shapes]
        mixed = [
            # The last position looks at all others.
            self._attend(*query.unbind(-2), *part.unbind(-2), causal=False)
            for query, part in zip(self._heads(q, ends, 1), self._heads(kv, shapes, 2), strict=True)
        ]
        return layer.mlp(layer.add_attention(at_ends(x), torch.cat(mixed)))[0]

    def _heads(self, rows: Tensor, shapes: Sequence[torch.Size], parts: int) -> list[Tensor]:
        """Rows (R, parts * d) as one (N * G, h, L, parts, e) per group."""
        sizes = [n * g * length for n, g, length in shapes]
        return [
            part.view(n * g, length, parts, self.heads, -1).permute(0, 3, 1, 2, 4)
            for part, (n, g, length) in zip(rows.split(sizes), shapes, strict=True)
        ]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        """Mixed values as rows, from q, k and v (N * G, h, positions, e)."""
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)


def positions_at_once(device: torch.device, layers: int, width: int) -> int:
    """Positions of all sequences together whose activations fit into `BYTES_AT_ONCE`."""
    most = BYTES_AT_ONCE.get(device.type, BYTES_AT_ONCE["cpu"])
    return most // (BYTES_PER_UNIT * layers * width)


def chunks(lengths_C: Tensor, most: int) -> list[Tensor]:
    """Split classes into chunks of bounded size, the shortest sequences first.

    Args:
        lengths_C: positions of each class's sequence.
        most: positions of a chunk; a class with more is a chunk of its own.

    Returns:
        The classes of each chunk.
    """
    order = lengths_C.argsort(stable=True)
    found: list[list[int]] = []
    used = most
    for c, length in zip(order.tolist(), lengths_C[order].tolist(), strict=True):
        if used + length > most:
            found.append([])
            used = 0
        found[-1].append(c)
        used += length
    return [torch.tensor(chunk) for chunk in found]


Observer = Callable[[Callable[[], Tensor]], None]
observer_of_recomputed: ContextVar[Observer | None] = ContextVar("recomputed", default=None)
"""Is given what `checkpointed` will compute again; no forward pass shows the memory for it."""


def checkpointed(call: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`call(*arguments)`, of which autograd keeps the arguments only and computes the rest again.

    Values and gradients are the same. The towers draw no random numbers, so no generator's state
    has to be kept.
    """
    if not torch.is_grad_enabled():
        return call(*arguments)
    observer = observer_of_recomputed.get()
    if observer is not None:
        observer(lambda: call(*arguments))
    out: Tensor = checkpoint(call, *arguments, use_reentrant=False, preserve_rng_state=False)
    return out


def place(x_NGLd: Tensor, slots_GM: Tensor, values_NGMd: Tensor) -> Tensor:
    """`x` with `values` at the context slots; a copy, because autograd needs the original.

    Fewer values than slots take the first ones.
    """
    index = slots_GM[None, :, : values_NGMd.shape[2], None].expand_as(values_NGMd)
    return x_NGLd.scatter(2, index, values_NGMd)


def _parts(rows: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Rows (R, d) as one view (N, G, L, d) per group."""
    sizes = [shape.numel() for shape in shapes]
    return [part.view(*shape, -1) for part, shape in zip(rows.split(sizes), shapes, strict=True)]


def _replaced(x: Tensor, groups: Sequence[Group], deep_NMd: Tensor) -> Tensor:
    """Rows with a deep prompt at the context's positions of every sequence."""
    parts = _parts(x, [embedded.shape[:3] for embedded, _ in groups])
    return torch.cat(
        [
            place(part, slots_GM, deep_NMd[:, None].expand(-1, part.shape[1], -1, -1)).flatten(0, 2)
            for part, (_, slots_GM) in zip(parts, groups, strict=True)
        ]
    )


def _with_added(
    parts: list[Tensor], added: Sequence[Tensor | None]
) -> tuple[Tensor, list[torch.Size]]:
    """Rows plus what an adapter adds, and their shapes: one prompt may become several."""
    sums = [p if a is None else p + a for p, a in zip(parts, added, strict=True)]
    return torch.cat([s.flatten(0, 2) for s in sums]), [s.shape[:3] for s in sums]
