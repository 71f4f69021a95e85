"""Checks on class names that hold for every data source and every tokenizer."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from fedprompt.errors import UserError

# Letters and marks that show nothing, although their categories are those of visible characters.
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
# Words of Persian and of Indian languages need joiners, and emoji need variation selectors too.
_SHAPING = frozenset("\u200c\u200d" + "".join(map(chr, range(0xFE00, 0xFE10))))


def refuse_invisible(class_names: Sequence[str], title: str) -> None:
    """Refuse a class name that is empty or contains invisible characters.

    Such a name looks like another one, but a tokenizer reads other tokens. Spaces of every kind
    are allowed, since tokenizers read them as a plain space.

    Args:
        class_names: the names in label order.
        title: name of the data set, for the message.

    Raises:
        UserError: a name has no visible character, or one that is invisible; the message gives its
            label.
    """
    for label, name in enumerate(class_names):
        if all(_is_invisible(letter) or letter.isspace() for letter in name):
            raise UserError(
                f"data: {title}: the name of class {label} is {name!a}, which has no visible "
                "character; name it in data.class_names."
            )
        hidden = next((c for c in name if _is_invisible(c) and c not in _SHAPING), None)
        if hidden is not None:
            raise UserError(
                f"data: {title}: the name of class {label} is {name!a}, which contains the "
                f"invisible character U+{ord(hidden):04X}; remove it, or name the class in "
                "data.class_names."
            )


def _is_invisible(letter: str) -> bool:
    """Whether a character shows nothing, and is no space; U+200B and soft hyphens, for example."""
    if letter in _BLANK or letter in _SHAPING:
        return True
    # Controls, formats such as U+200B, and halves of characters.
    return unicodedata.category(letter) in ("Cc", "Cf", "Cs") and not letter.isspace()
