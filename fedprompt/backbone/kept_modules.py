"""Modules of a tower whose weight matrices are kept in fewer bits (`matrices.py`).

They take the places of the modules of PyTorch that open_clip, timm and transformers build their
towers from, so that a tower's own pass works unchanged. The fast paths read the matrices themselves
(`frozen_layer.py`). Reading an attribute such as `weight` gives the dense matrix, for code of
theirs that asks for it.

Convolutions, norms, positions and projections stay in float32: together they are a few per cent of
a transformer's weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedprompt.backbone.matrices import FIELDS, KeptMatrix, linear

Kind = Literal["product", "rows"]
"""Whether a matrix is multiplied with, or single rows of it are looked up."""


class _Kept(nn.Module):
    """Holds a kept matrix in buffers, which move with the module and are in no checkpoint."""

    # open_clip asks here, and not the weight, for the dtype of a text tower's activations.
    int8_original_dtype = torch.float32

    def _keep(self, matrix: KeptMatrix) -> None:
        for name in FIELDS:
            self.register_buffer(name, matrix.tensors.get(name), persistent=False)

    @property
    def matrix(self) -> KeptMatrix:
        """The matrix, where the module is now."""
        return KeptMatrix.of({n: t for n in FIELDS if (t := self._buffers[n]) is not None})


class KeptLinear(_Kept):
    """`nn.Linear` with a kept weight.

    Args:
        linear: the module that it replaces; its bias is taken over.
        matrix: its weight.
    """

    def __init__(self, linear: nn.Linear, matrix: KeptMatrix) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._keep(matrix)

    @property
    def weight(self) -> Tensor:
        """The dense weight."""
        return self.matrix.dense()

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear` does."""
        return _product(x, self.matrix, self.bias)


class KeptEmbedding(_Kept):
    """`nn.Embedding` with a kept weight.

    Args:
        embedding: the module that it replaces.
        matrix: its weight.
    """

    def __init__(self, embedding: nn.Embedding, matrix: KeptMatrix) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = matrix.shape
        self.padding_idx = embedding.padding_idx
        self._keep(matrix)

    @property
    def weight(self) -> Tensor:
        """The dense weight."""
        return self.matrix.dense()

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of `ids`, float32."""
        rows: Tensor = self.matrix[ids.flatten()].dense()
        return rows.view(*ids.shape, -1)


class KeptAttention(_Kept):
    """`nn.MultiheadAttention` with a kept weight of queries, keys and values.

    Args:
        attention: the module that it replaces; its biases and its output projection are taken over.
        matrix: its `in_proj_weight`.
    """

    def __init__(self, attention: nn.MultiheadAttention, matrix: KeptMatrix) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.batch_first = attention.batch_first
        self.in_proj_bias, self.out_proj = attention.in_proj_bias, attention.out_proj
        self._keep(matrix)

    @property
    def in_proj_weight(self) -> Tensor:
        """The dense weight."""
        return self.matrix.dense()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """As `nn.MultiheadAttention` does, without returning the shares of attention."""
        assert not need_weights
        if query is key is value:
            parts = self._project(query, slice(None)).chunk(3, dim=-1)
        else:
            d = self.embed_dim
            thirds = (slice(d), slice(d, 2 * d), slice(2 * d, None))
            inputs = zip((query, key, value), thirds, strict=True)
            parts = tuple(self._project(x, rows) for x, rows in inputs)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        out_NLd = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return (out_NLd if self.batch_first else out_NLd.transpose(0, 1)), None

    def _project(self, x: Tensor, rows: slice) -> Tensor:
        """Some of queries, keys and values, batch first."""
        x_NLd = x if self.batch_first else x.transpose(0, 1)
        bias = None if self.in_proj_bias is None else self.in_proj_bias[rows]
        return _product(x_NLd, self.matrix[rows], bias)


def _product(x: Tensor, matrix: KeptMatrix, bias: Tensor | None) -> Tensor:
    """`linear` in the dtype that autocast asks for."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        matrix, bias = replace(matrix, dtype=dtype), None if bias is None else bias.to(dtype)
    return linear(x.to(matrix.dtype), matrix, bias)


def matrices(model: nn.Module) -> Iterator[tuple[str, Kind]]:
    """The matrices of a model that can be kept in fewer bits: their names as tensors, and kinds."""
    for name, module in model.named_modules(remove_duplicate=False):
        match module:
            case nn.Embedding():
                yield f"{name}.weight", "rows"
            # open_clip looks whether its projection is an `nn.Linear`.
            case nn.Linear() if not name.endswith("text_projection"):
                yield f"{name}.weight", "product"
            case nn.MultiheadAttention() if module.in_proj_weight is not None:
                yield f"{name}.in_proj_weight", "product"


def install(model: nn.Module, kept: Mapping[str, KeptMatrix]) -> None:
    """Put modules with kept matrices into a model, in the places of its own.

    Args:
        model: the model; changed in place.
        kept: matrices by their names in `matrices`.
    """
    # A module may stand in several places, under as many names.
    made: dict[int, nn.Module] = {}
    for name, matrix in kept.items():
        path, _, _ = name.rpartition(".")
        parent, _, child = path.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, _Kept):  # the module above it stands in several places
            continue
        if id(module) not in made:
            made[id(module)] = _with_kept(module, matrix)
        setattr(model.get_submodule(parent), child, made[id(module)])


def _with_kept(module: nn.Module, matrix: KeptMatrix) -> nn.Module:
    match module:
        case nn.Embedding():
            return KeptEmbedding(module, matrix)
        case nn.MultiheadAttention():
            return KeptAttention(module, matrix)
        case nn.Linear():
            return KeptLinear(module, matrix)
    raise TypeError(type(module).__name__)


def matrix_of(module: Any) -> Tensor | KeptMatrix:
    """The weight of a linear module, or that of an attention's queries, keys and values."""
    if isinstance(module, _Kept):
        return module.matrix
    weight: Tensor = (
        module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight
    )
    return weight
