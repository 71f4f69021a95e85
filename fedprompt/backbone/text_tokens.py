"""Token ids of class prompts: where the context, the class name and the end of the text stand.

Learned context tokens have no ids. The prompt is tokenised with a placeholder word in the place of
each, and `TextTower` replaces the placeholders' embeddings by the learned ones.

Shape suffixes: C classes, L text positions, M context tokens, d text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_parts import TextParts
from fedprompt.errors import UserError

PLACEHOLDER = "X"
"""A word that CLIP's tokenizers turn into a single token."""


@dataclass(frozen=True)
class ClassTokens:
    """The prompts of a class list as token ids.

    Attributes:
        ids_CL: ids of `[SOS] X X ... name. [EOT]`, padded.
        name_end_C: position after the last token of each class name.
        pooled_C: position at which each prompt's feature is read, end-of-text in CLIP.
        first: position of the first context token, 1 in CLIP.
    """

    ids_CL: Tensor
    name_end_C: Tensor
    pooled_C: Tensor
    first: int


def tokenise(clip: FrozenCLIP, class_names: Sequence[str], context_tokens: int) -> ClassTokens:
    """Tokenise the prompts of a class list.

    Args:
        clip: the frozen backbone.
        class_names: C names; underscores count as spaces.
        context_tokens: M, at least 0.

    Raises:
        UserError: a prompt needs more than L positions, or the tokenizer does not turn the
            placeholder into one token.
    """
    length = clip.text.context_length
    placeholders = " ".join([PLACEHOLDER] * context_tokens)
    texts = [f"{placeholders} {name.replace('_', ' ')}.".strip() for name in class_names]
    # Tokenizers silently cut texts that are too long, so the check uses 256 more positions.
    roomy_ids = clip.tokenizer(texts, context_length=length + 256)
    ends = _end_of_text(clip.text, roomy_ids)
    for name, end in zip(class_names, ends.tolist(), strict=True):
        if end >= length:
            raise UserError(
                f"class name '{name}' with {context_tokens} context tokens needs {end + 1} text "
                f"positions, but {clip.name} has {length}; shorten the name or the context."
            )
    ids_CL = clip.tokenizer(texts, context_length=length)
    first = _specials_before(clip)
    run = ids_CL[:, first : first + context_tokens]
    if not bool((run == ids_CL[:1, first : first + 1]).all()) and context_tokens:
        raise UserError(
            f"the tokenizer of {clip.name} does not turn '{PLACEHOLDER}' into one token, so "
            "prompts cannot be placed."
        )
    bare_CL = clip.tokenizer([t.removesuffix(".") for t in texts], context_length=length)
    # Some tokenizers (SigLIP's) drop the full stop; then the name ends where the text ends.
    dropped_C = (bare_CL == ids_CL).all(dim=-1)
    name_end_C = _end_of_text(clip.text, ids_CL) - (~dropped_C).long()
    return ClassTokens(ids_CL, name_end_C, _pooled(clip.text, ids_CL), first)


def token_count(clip: FrozenCLIP, text: str) -> int:
    """Count the tokens of a text without the special ones."""
    return int(_end_of_text(clip.text, clip.tokenizer([text]))[0]) - _specials_before(clip)


def context_init(clip: FrozenCLIP, text: str | None, context_tokens: int, draw: Tensor) -> Tensor:
    """Return the initial context of a text prompt.

    Args:
        clip: the frozen backbone.
        text: words whose embeddings are the context; None or empty for `draw`.
        context_tokens: M.
        draw: (M, d), random numbers for a context that starts from no words.

    Returns:
        (M, d), float32 on the CPU.

    Raises:
        UserError: `text` does not have M tokens.
    """
    if not text:
        return draw
    ids = clip.tokenizer([text])
    first = _specials_before(clip)
    end = int(_end_of_text(clip.text, ids)[0])
    if end - first != context_tokens:
        raise UserError(
            f"context_init '{text}' has {end - first} tokens, but context_tokens is "
            f"{context_tokens}; make them equal."
        )
    with torch.no_grad():
        embedded: Tensor = clip.text.token_embedding(ids[0, first:end].to(clip.device))
    return embedded.detach().float().cpu()


def _specials_before(clip: FrozenCLIP) -> int:
    """How many special tokens stand before the text: 1 ([SOS]) in CLIP, 0 in SigLIP."""
    single, double = clip.tokenizer([PLACEHOLDER, f"{PLACEHOLDER} {PLACEHOLDER}"]).tolist()
    differing = next(i for i, (a, b) in enumerate(zip(single, double, strict=True)) if a != b)
    return differing - 1


def _end_of_text(parts: TextParts, ids_CL: Tensor) -> Tensor:
    """Index of the end-of-text token of each row (C,)."""
    if parts.pool_type == "eos":
        assert parts.eos_id is not None
        return ids_CL.eq(parts.eos_id).int().argmax(dim=-1)
    if parts.pool_type == "argmax":
        # End-of-text has the largest id of CLIP's vocabulary.
        return ids_CL.argmax(dim=-1)
    # Towers that pool elsewhere (SigLIP) pad with one repeated id; the text ends where it starts.
    padding = ids_CL[:, -1:]
    trailing = (ids_CL == padding).flip(-1).int().cumprod(-1).sum(-1)
    return ids_CL.shape[1] - trailing


def _pooled(parts: TextParts, ids_CL: Tensor) -> Tensor:
    if parts.pools_at_end:
        return _end_of_text(parts, ids_CL)
    return torch.full((ids_CL.shape[0],), ids_CL.shape[1] - 1)
