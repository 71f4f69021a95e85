"""Sentences about the classes of a data set, such as a language model writes them.

`data.descriptions` names the file: a shipped one of `configs/descriptions`, or any YAML file

    river:
      - a river that winds through fields.
      - a long curved band of water.

Methods that learn from sentences read them from `Task.descriptions`; the others ignore them.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedprompt.config.shipped import load_yaml, yaml_file
from fedprompt.errors import UserError, did_you_mean

KEY = "data.descriptions"

Descriptions = tuple[tuple[str, tuple[str, ...]], ...]
"""Pairs of a class name, with spaces, and its sentences. A tuple, because tasks are compared."""


def load_descriptions(name: str | None, class_names: Sequence[str]) -> Descriptions:
    """Read the sentences of a data set's classes.

    Args:
        name: a shipped file's name, or the path of a YAML file; None for no sentences.
        class_names: the classes that must have sentences. The file may have others.

    Returns:
        The sentences of every class of the file; nothing if `name` is None.

    Raises:
        UserError: the file cannot be read, a class has no sentences, or a value is no list of
            texts.
    """
    if name is None:
        return ()
    values = load_yaml(yaml_file("descriptions", name), KEY)
    found = {}
    for label, sentences in values.items():
        if (
            not isinstance(sentences, list)
            or not sentences
            or not all(isinstance(s, str) and s.strip() for s in sentences)
        ):
            raise UserError(f"{KEY}: {name}: class '{label}' must have a list of sentences.")
        found[plain(label)] = tuple(sentences)
    for label in class_names:
        if plain(label) not in found:
            raise UserError(
                f"{KEY}: {name} has no sentences for class '{plain(label)}'."
                f"{did_you_mean(plain(label), sorted(found))}"
            )
    return tuple(found.items())


def plain(class_name: str) -> str:
    """A class name with spaces for underscores, as prompts have it."""
    return class_name.replace("_", " ")
