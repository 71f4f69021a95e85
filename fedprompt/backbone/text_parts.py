"""The pieces of a text tower that learned prompts pass through, under one name for each.

open_clip flattens the text tower of a `CLIP` into the model itself and keeps that of a
`CustomTextCLIP` as a module. `FrozenCLIP.text` hides the difference from everything else.

Shape suffixes: L text positions, d text width, D joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

from fedprompt.backbone.frozen_layer import FrozenLayer
from fedprompt.errors import UserError


@dataclass(frozen=True)
class TextParts:
    """The pieces of a text tower.

    Attributes:
        token_embedding: token ids to embeddings (..., d).
        positional_embedding_Ld: added to the embeddings.
        blocks: open_clip's transformer blocks.
        ln_final: the last layer norm.
        projection: (d, D), a module, or None where the tower has no projection.
        attn_mask_LL: added to attention scores; None where every position sees every other.
        heads: attention heads of a block.
        width: d.
        context_length: L.
        pool_type: where open_clip reads the feature: `argmax`, `eos`, `first` or `last`.
        eos_id: id of the end-of-text token, for `eos`.
        causal: whether a position sees only itself and earlier ones.
        pools_at_end: whether the feature is read at the end-of-text token. The fast path needs
            this and `causal`.
        plain_blocks: whether every block can be expressed as a `FrozenLayer`.
    """

    token_embedding: nn.Embedding
    positional_embedding_Ld: Tensor
    blocks: Sequence[Any]
    ln_final: nn.Module
    projection: Tensor | nn.Module | None
    attn_mask_LL: Tensor | None
    heads: int
    width: int
    context_length: int
    pool_type: str
    eos_id: int | None
    causal: bool
    pools_at_end: bool
    plain_blocks: bool

    @property
    def truncates(self) -> bool:
        """Whether positions after the end of the text may be left out."""
        return self.causal and self.pools_at_end

    @property
    def packable(self) -> bool:
        """Whether texts can be packed.

        With one layer, the first would be the last as well.
        """
        return self.truncates and self.plain_blocks and len(self.blocks) > 1

    def project(self, x: Tensor) -> Tensor:
        """Features (..., D) of pooled, normalised hidden states (..., d)."""
        if self.projection is None:
            return x
        if isinstance(self.projection, Tensor):
            return x @ self.projection
        projected: Tensor = self.projection(x)
        return projected


def text_parts(model: CLIP | CustomTextCLIP) -> TextParts:
    """Return the pieces of a model's text tower.

    Raises:
        UserError: the tower is of another kind, or adds a class embedding or a padding mask, so
            that learned prompts cannot take the place of tokens.
    """
    text = getattr(model, "text", model)
    unsupported = (
        not hasattr(text, "transformer")
        or not hasattr(text.transformer, "resblocks")
        or getattr(text, "cls_emb", None) is not None
        or getattr(text, "use_pad_mask", False)
    )
    if unsupported:
        raise no_prompts(f"this model ({type(text).__name__})")
    blocks = text.transformer.resblocks
    # CLIP flattens its text tower into itself and gives this attribute another name.
    pool_type: str = getattr(text, "text_pool_type" if text is model else "pool_type")
    mask = text.attn_mask
    return TextParts(
        token_embedding=text.token_embedding,
        positional_embedding_Ld=text.positional_embedding,
        blocks=blocks,
        ln_final=text.ln_final,
        projection=text.text_projection,
        attn_mask_LL=mask,
        heads=blocks[0].attn.num_heads,
        width=text.positional_embedding.shape[-1],
        context_length=text.context_length,
        pool_type=pool_type,
        eos_id=getattr(text, "text_eos_id", getattr(text, "eos_id", None)),
        causal=mask is not None,
        pools_at_end=pool_type in ("argmax", "eos"),
        plain_blocks=all(FrozenLayer.supports(b) for b in blocks),
    )


def no_prompts(model: str) -> UserError:
    """The error for a model whose text tower cannot take learned prompts."""
    return UserError(
        f"backbone: the text tower of {model} cannot take learned prompts; choose a model with "
        "open_clip's own text transformer."
    )
