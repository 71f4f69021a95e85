"""Texts to token ids, without the silent repairs of tokenizers.

A tokenizer cuts a text that is too long, turns the text `<end_of_text>` into the special token, and
gives two spellings of a name the same ids. Each of these spoils results without an error, so every
text for the text tower is tokenised here.

Shape suffixes: C texts, L text positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedprompt.backbone.text_parts import TextParts
from fedprompt.errors import UserError

PLACEHOLDER = "X"
"""A word that CLIP's tokenizers turn into a single token."""
ROOM = 256
"""Positions beyond those of the text tower, with which too long a text is measured."""

Tokenizer = Callable[..., Tensor]
"""From texts and `context_length=L` to token ids (C, L)."""


def token_rows(
    tokenizer: Tokenizer,
    parts: TextParts,
    texts: Sequence[str],
    model: str,
    describe: Callable[[int], str] | None = None,
) -> Tensor:
    """Tokenise texts that the text tower can read completely.

    Args:
        tokenizer: the model's tokenizer.
        parts: the model's text tower.
        texts: C texts.
        model: name of the model, for messages.
        describe: what messages call text i; the text itself by default.

    Returns:
        Token ids (C, L), padded.

    Raises:
        UserError: a text needs more than L positions, or contains a special token.
    """
    what = describe or (lambda i: f"the text '{_shortened(texts[i])}'")
    length = parts.context_length
    ids_CL = tokenizer(list(texts), context_length=length + ROOM)
    special = specials_within(tokenizer, parts, ids_CL)
    if special:
        raise UserError(
            f"{what(special[0])} contains a special token of {model}'s tokenizer, such as "
            "<end_of_text>; write it differently."
        )
    ends = end_of_text(parts, ids_CL)
    for i in torch.nonzero(ends >= length).flatten().tolist():
        needed = int(ends[i]) + 1
        least = "at least " if needed >= length + ROOM else ""
        raise UserError(
            f"{what(i)} needs {least}{needed} text positions, but {model} has {length}; shorten it."
        )
    return ids_CL[:, :length].contiguous()


def refuse_equal_rows(ids_CL: Tensor, class_names: Sequence[str], model: str) -> None:
    """Refuse two classes that have the same prompt, so that the second could never be right.

    Args:
        ids_CL: token ids of the prompt of each class.
        class_names: C names.
        model: name of the model, for the message.

    Raises:
        UserError: two rows are equal; the message names both classes.
    """
    _, row_C, count = ids_CL.unique(dim=0, return_inverse=True, return_counts=True)
    twins = torch.nonzero(count[row_C] > 1).flatten().tolist()
    if not twins:
        return
    first = twins[0]
    second = next(i for i in twins[1:] if row_C[i] == row_C[first])
    raise UserError(
        f"the class names '{class_names[first]}' and '{class_names[second]}' (classes {first} and "
        f"{second}) have the same prompt: the tokenizer of {model} does not tell them apart, and "
        "the second would never be predicted. Rename one in data.class_names, or merge the classes."
    )


def specials_before(tokenizer: Tokenizer) -> int:
    """How many special tokens stand before the text: 1 ([SOS]) in CLIP, 0 in SigLIP."""
    single, double = tokenizer([PLACEHOLDER, f"{PLACEHOLDER} {PLACEHOLDER}"]).tolist()
    differing = next(i for i, (a, b) in enumerate(zip(single, double, strict=True)) if a != b)
    return differing - 1


def end_of_text(parts: TextParts, ids_CL: Tensor) -> Tensor:
    """Index of the end-of-text token of each row (C,)."""
    if parts.pad_id is not None:
        # Hugging Face's tokenizers pad on the right with an id that no text has.
        return ids_CL.ne(parts.pad_id).sum(dim=-1) - 1
    if parts.pool_type == "eos":
        assert parts.eos_id is not None
        return ids_CL.eq(parts.eos_id).int().argmax(dim=-1)
    if parts.pool_type == "argmax":
        # End-of-text has the largest id of CLIP's vocabulary.
        return ids_CL.argmax(dim=-1)
    # Towers that pool elsewhere (SigLIP) pad with one repeated id; the text ends where it starts.
    return ids_CL.shape[1] - _trailing(ids_CL)


def specials_within(tokenizer: Tokenizer, parts: TextParts, ids_CL: Tensor) -> list[int]:
    """The rows that contain more special tokens than the tokenizer itself adds."""
    # The empty text consists of special tokens only. Padding does not count: in CLIP it is 0, which
    # is also the id of a punctuation mark.
    empty_1L = tokenizer([""], context_length=ids_CL.shape[1])
    first, end = specials_before(tokenizer), int(end_of_text(parts, empty_1L)[0])
    specials = torch.cat([empty_1L[0, :first], empty_1L[0, end : end + 1]])

    def count(rows: Tensor) -> Tensor:
        inside = torch.arange(rows.shape[1]) < rows.shape[1] - _trailing(rows)[:, None]
        return (torch.isin(rows, specials) & inside).sum(-1)

    return torch.nonzero(count(ids_CL) > count(empty_1L)).flatten().tolist()


def _trailing(ids_CL: Tensor) -> Tensor:
    """How often the last id of each row is repeated at its end (C,)."""
    return (ids_CL == ids_CL[:, -1:]).flip(-1).int().cumprod(-1).sum(-1)


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
