"""The pieces of a text tower that learned prompts pass through, under one name for each.

open_clip flattens the text tower of a `CLIP` into the model itself and keeps that of the others as
a module: its own transformer, or one of Hugging Face's. `FrozenCLIP.text` hides the difference from
everything else.

Shape suffixes: L text positions, d text width, D joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH
from torch import Tensor, nn

from fedprompt.backbone.frozen_layer import FrozenLayer
from fedprompt.backbone.text_pass import HuggingFacePass, OpenClipPass, TextPass
from fedprompt.errors import UserError


@dataclass(frozen=True)
class TextParts:
    """The pieces of a text tower.

    Attributes:
        token_embedding: token ids to embeddings (..., d).
        positional_embedding_Ld: added to the embeddings; zeros where the tower adds its positions
            later, on its own.
        blocks: transformer blocks of open_clip or of Hugging Face.
        ln_final: the last layer norm.
        projection: (d, D), a module, or None where the tower has no projection.
        attn_mask_LL: added to attention scores; None where every position sees every other.
        heads: attention heads of a block.
        width: d.
        context_length: L.
        pool_type: where open_clip reads the feature: `argmax`, `eos`, `first` or `last`. Towers
            with a class embedding read it there, and those of Hugging Face by a pooler.
        eos_id: id of the end-of-text token, for `eos`.
        pad_id: id of the padding, for towers of Hugging Face.
        own_pass: from embeddings to pooled hidden states, through the tower's own blocks.
        causal: whether a position sees only itself and earlier ones.
        pools_at_end: whether the feature is read at the end-of-text token.
        cut_at_end: whether no position sees what follows the end of the text, so that it may be
            left out.
        plain_blocks: whether every block can be expressed as a `FrozenLayer`.
        adaptable: whether the blocks have the parts that adapters use.
    """

    token_embedding: nn.Module
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
    pad_id: int | None
    own_pass: TextPass
    causal: bool
    pools_at_end: bool
    cut_at_end: bool
    plain_blocks: bool
    adaptable: bool

    @property
    def fast(self) -> bool:
        """Whether texts may be cut at their end and take paths of ours."""
        return self.causal and self.pools_at_end and self.plain_blocks

    @property
    def packable(self) -> bool:
        """Whether texts can be packed.

        With one layer, the first would be the last as well.
        """
        return self.fast and len(self.blocks) > 1

    def lengths(self, ends: Tensor) -> Tensor:
        """How many positions have to be computed of texts that end at the positions `ends`."""
        if not self.cut_at_end:
            return ends.new_full(ends.shape, self.context_length)
        return (ends + 1 + self.own_pass.padding_seen).clamp(max=self.context_length)

    def check_adapters(self, model: str) -> None:
        """Check that adapters can stand beside the blocks.

        Args:
            model: name of the model, for the message.

        Raises:
            UserError: the blocks are of another kind.
        """
        if not self.adaptable:
            kind = type(self.blocks[0]).__name__
            raise UserError(
                f"backbone: adapters need text blocks of open_clip, but those of {model} are of "
                f"another kind ({kind}); choose another backbone."
            )

    def project(self, x: Tensor) -> Tensor:
        """Features (..., D) of pooled, normalised hidden states (..., d)."""
        if self.projection is None:
            return x
        if isinstance(self.projection, Tensor):
            return x @ self.projection
        projected: Tensor = self.projection(x)
        return projected


def text_parts(model: Any) -> TextParts:
    """Return the pieces of a model's text tower.

    Args:
        model: a `CLIP`, `CustomTextCLIP` or `CoCa` of open_clip.

    Raises:
        UserError: the tower is of another kind, so that we do not know where learned prompts would
            take the place of tokens.
    """
    text = getattr(model, "text", model)
    if isinstance(text, HFTextEncoder):
        return _of_hugging_face(text)
    if not hasattr(getattr(text, "transformer", None), "resblocks"):
        raise UserError(
            f"backbone: the text tower of this model ({type(text).__name__}) cannot take learned "
            "prompts; choose a model with a text transformer of open_clip or of Hugging Face."
        )
    return _of_open_clip(text, flattened=text is model)


def _of_open_clip(text: Any, *, flattened: bool) -> TextParts:
    blocks = text.transformer.resblocks
    # CLIP flattens its text tower into itself and gives this attribute another name.
    pool_type: str = getattr(text, "text_pool_type" if flattened else "pool_type")
    own_pass = OpenClipPass(text, pool_type)
    has_class = own_pass.class_embedding is not None
    causal = text.attn_mask is not None
    pools_at_end = pool_type in ("argmax", "eos") and not has_class
    return TextParts(
        token_embedding=text.token_embedding,
        # A class embedding has the last position, after those of the text.
        positional_embedding_Ld=text.positional_embedding[: text.context_length],
        blocks=blocks,
        ln_final=text.ln_final,
        projection=text.text_projection,
        attn_mask_LL=text.attn_mask,
        heads=blocks[0].attn.num_heads,
        width=text.positional_embedding.shape[-1],
        context_length=text.context_length,
        pool_type=pool_type,
        eos_id=getattr(text, "text_eos_id", getattr(text, "eos_id", None)),
        pad_id=None,
        own_pass=own_pass,
        causal=causal,
        pools_at_end=pools_at_end,
        cut_at_end=has_class or (pools_at_end and (causal or own_pass.masks_padding)),
        # The fast paths know no class embedding.
        plain_blocks=not has_class and all(FrozenLayer.supports(b) for b in blocks),
        adaptable=True,
    )


def _of_hugging_face(text: HFTextEncoder) -> TextParts:
    model, config = text.transformer, text.config
    # Where the kinds of models that open_clip knows keep their blocks: BERT and RoBERTa, T5, M2M.
    body = getattr(model, "encoder", model)
    blocks = next(getattr(body, n) for n in ("layer", "block", "layers") if hasattr(body, n))
    embedding = model.get_input_embeddings()
    # T5 has relative positions, and no limit of its own.
    length = text.context_length or DEFAULT_CONTEXT_LENGTH
    width = embedding.weight.shape[1]
    return TextParts(
        token_embedding=embedding,
        positional_embedding_Ld=embedding.weight.new_zeros(1, 1).expand(length, width),
        blocks=blocks,
        ln_final=nn.Identity(),
        projection=text.proj,
        attn_mask_LL=None,
        heads=config.num_attention_heads,
        width=width,
        context_length=length,
        pool_type="pooler",
        eos_id=None,
        pad_id=config.pad_token_id,
        own_pass=HuggingFacePass(text, blocks, config.pad_token_id),
        causal=False,
        pools_at_end=False,
        cut_at_end=True,
        plain_blocks=False,
        adaptable=False,
    )
