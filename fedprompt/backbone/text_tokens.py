"""Token ids of class prompts: where the context, the class name and the end of the text stand.

Learned context tokens have no ids. The prompt is tokenised with a placeholder word in the place of
each, and `TextTower` replaces the placeholders' embeddings by the learned ones.

Shape suffixes: C classes, L text positions, M context tokens, d text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_parts import TextParts
from fedprompt.backbone.token_rows import (
    PLACEHOLDER,
    end_of_text,
    refuse_equal_rows,
    specials_before,
    token_rows,
)
from fedprompt.errors import UserError

ClassPosition = Literal["end", "middle", "front"]


@dataclass(frozen=True)
class ClassTokens:
    """The prompts of a class list as token ids.

    Attributes:
        ids_CL: ids of `[SOS] X X ... name. [EOT]`, padded.
        name_end_C: position after the last token of each class name.
        end_C: position of each prompt's last token, end-of-text in CLIP. Where the tower reads its
            feature at the last of all positions, it is that one.
        first: position of the first context token, 1 in CLIP.
    """

    ids_CL: Tensor
    name_end_C: Tensor
    end_C: Tensor
    first: int


def tokenise(clip: FrozenCLIP, class_names: Sequence[str], context_tokens: int) -> ClassTokens:
    """Tokenise the prompts of a class list.

    Args:
        clip: the frozen backbone.
        class_names: C names; underscores count as spaces.
        context_tokens: M, at least 0.

    Raises:
        UserError: a prompt needs more than L positions or contains a special token, or the
            tokenizer does not turn the placeholder into one token.
    """
    length = clip.text.context_length
    placeholders = " ".join([PLACEHOLDER] * context_tokens)
    texts = [f"{placeholders} {name.replace('_', ' ')}.".strip() for name in class_names]

    def describe(i: int) -> str:
        return f"class name '{class_names[i]}' with {context_tokens} context tokens"

    ids_CL = token_rows(clip.tokenizer, clip.text, texts, clip.name, describe)
    first = specials_before(clip.tokenizer)
    # Not compared with one another: some tokenizers give the first word of a text another id.
    alone = token_rows(clip.tokenizer, clip.text, [placeholders], clip.name)
    if int(end_of_text(clip.text, alone)[0]) != first + context_tokens:
        raise UserError(
            f"the tokenizer of {clip.name} does not turn '{PLACEHOLDER}' into one token, so "
            "prompts cannot be placed."
        )
    bare_CL = clip.tokenizer([t.removesuffix(".") for t in texts], context_length=length)
    # Some tokenizers (SigLIP's) drop the full stop; then the name ends where the text ends.
    dropped_C = (bare_CL == ids_CL).all(dim=-1)
    name_end_C = end_of_text(clip.text, ids_CL) - (~dropped_C).long()
    return ClassTokens(ids_CL, name_end_C, _ends(clip.text, ids_CL), first)


def in_order(
    tokens: ClassTokens, context_tokens: int, position: ClassPosition
) -> tuple[Tensor, Tensor]:
    """Move the class name to its position.

    Args:
        tokens: prompts with the name at the end.
        context_tokens: M.
        position: where the class name stands.

    Returns:
        Token ids (C, L), and the positions (C, M) of the context.
    """
    m, first = context_tokens, tokens.first
    split = {"end": m, "middle": m // 2, "front": 0}[position]
    ids, slots = [], []
    for row, name_end in zip(tokens.ids_CL, tokens.name_end_C.tolist(), strict=True):
        before, x, name, rest = row.tensor_split((first, first + m, name_end))
        ids.append(torch.cat([before, x[:split], name, x[split:], rest]))
        left = torch.arange(first, first + split)
        slots.append(torch.cat([left, torch.arange(first + split, first + m) + len(name)]))
    return torch.stack(ids), torch.stack(slots)


def refuse_twins(clip: FrozenCLIP, class_names: Sequence[str]) -> None:
    """Refuse a class list in which two names have the same tokens, or one has none.

    Args:
        clip: the frozen backbone.
        class_names: C names; underscores count as spaces.

    Raises:
        UserError: two classes would have the same prompt, a name has no token of its own, or it
            cannot be tokenised.
    """
    names = [name.replace("_", " ") for name in class_names]

    def describe(i: int) -> str:
        return f"class name '{class_names[i]}'"

    ids_CL = token_rows(clip.tokenizer, clip.text, names, clip.name, describe)
    # Tokenizers drop spaces, some of them punctuation, and CLIP's reads `&nbsp;` as a space.
    empty_1L = clip.tokenizer([""], context_length=ids_CL.shape[1])
    for i in torch.nonzero((ids_CL == empty_1L).all(dim=-1)).flatten().tolist():
        raise UserError(
            f"{describe(i)} (class {i}) has no token in {clip.name}: its tokenizer drops all of "
            "it. Name the class in words in data.class_names."
        )
    refuse_equal_rows(ids_CL, class_names, clip.name)


def token_count(clip: FrozenCLIP, text: str) -> int:
    """Count the tokens of a text without the special ones.

    Raises:
        UserError: the text needs more than L positions or contains a special token.
    """
    ids_1L = token_rows(clip.tokenizer, clip.text, [text], clip.name)
    return int(end_of_text(clip.text, ids_1L)[0]) - specials_before(clip.tokenizer)


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
        UserError: `text` does not have M tokens, or contains a special token.
    """
    if not text:
        return draw
    ids = token_rows(clip.tokenizer, clip.text, [text], clip.name, lambda _: "context_init")
    first = specials_before(clip.tokenizer)
    end = int(end_of_text(clip.text, ids)[0])
    if end - first != context_tokens:
        raise UserError(
            f"context_init '{text}' has {end - first} tokens, but context_tokens is "
            f"{context_tokens}; make them equal."
        )
    with torch.no_grad():
        embedded: Tensor = clip.text.token_embedding(ids[0, first:end].to(clip.device))
    return embedded.detach().float().cpu()


def _ends(parts: TextParts, ids_CL: Tensor) -> Tensor:
    if parts.pools_at_end or parts.cut_at_end:
        return end_of_text(parts, ids_CL)
    return torch.full((ids_CL.shape[0],), ids_CL.shape[1] - 1)
