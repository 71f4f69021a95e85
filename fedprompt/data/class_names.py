"""Checks on class names that hold for every data source and every tokenizer."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from fedprompt.errors import UserError


def refuse_invisible(class_names: Sequence[str], title: str) -> None:
    """Refuse a class name that is empty or consists of invisible characters.

    Args:
        class_names: the names in label order.
        title: name of the data set, for the message.

    Raises:
        UserError: a name has no visible character; the message gives its label.
    """
    for label, name in enumerate(class_names):
        # Z are separators such as spaces; C are controls and formats such as U+200B.
        if all(unicodedata.category(letter)[0] in "ZC" for letter in name):
            raise UserError(
                f"data: {title}: the name of class {label} is {name!a}, which has no visible "
                "character; name it in data.class_names."
            )
