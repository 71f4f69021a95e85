"""Finds the class names and labels of a Hugging Face data set. Suffix: N rows of all splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedprompt.data.images import name_key
from fedprompt.data.sources.parts.hub_keys import HubKeys
from fedprompt.data.sources.parts.hub_splits import Part
from fedprompt.errors import UserError, did_you_mean

NamedLabels = tuple[tuple[str, ...], NDArray[np.int64]]
"""Class names in label order, and the label of every row (N,)."""


def read_labels(
    parts: Sequence[Part],
    config: HubKeys,
    classes: Mapping[str, str],
    ignore: Sequence[str],
    spell: Callable[[str], str],
) -> NamedLabels:
    """Number the labels of all splits and name the classes.

    Args:
        parts: the splits.
        config: the label column, and the class names that the user has set.
        classes: a mapping from the authors' class names to the names used in prompts, in label
            order. If it is empty, the numbers or names of the data set are used.
        ignore: the authors' names of classes whose rows were left out. They need not be in
            `classes`.
        spell: makes a class name of the data set readable if `classes` is empty.

    Returns:
        Class names in label order, and the label of every row (N,).

    Raises:
        UserError: a row has no label, splits number their classes differently, or class names are
            missing or do not match.
    """
    for part in parts:
        for row, value in enumerate(part.labels):
            # `datasets.ClassLabel` stores -1 where a label is withheld, as in some test splits.
            if value is None or value == -1:
                raise UserError(
                    f"data: split '{part.split}', row {row} has no label; use a labelled split."
                )
        # The feature holds the class names: equal numbers mean equal classes only if it is equal.
        if part.label_feature != parts[0].label_feature:
            raise UserError(
                f"data: splits '{parts[0].split}' and '{part.split}' number their classes "
                f"differently in column '{config.label_column}'; relabel one of them."
            )
    if len(set(map(name_key, config.class_names))) < len(config.class_names):
        raise UserError("data: data.class_names lists a class twice.")
    values = [value for part in parts for value in part.labels]
    names = _feature_names(parts[0].label_feature)
    is_text = all(isinstance(value, str) for value in values)
    if classes and names is not None:
        return _match_labels(names, values, classes, ignore)
    # Texts are numbered in sorted order, so that labels do not depend on the order of the rows.
    if classes and is_text:
        texts = sorted(set(values))
        return _match_labels(texts, [texts.index(value) for value in values], classes, ignore)
    if names is not None:
        return _named_labels(names, values, config, spell)
    if is_text:
        return _text_labels(values, config.class_names, spell)
    if all(isinstance(value, int) for value in values):
        return _numbered_labels(values, config)
    raise UserError(
        f"data: data.label_column: '{config.label_column}' holds {parts[0].label_feature}, not "
        "class labels."
    )


def _feature_names(feature: Any) -> list[str] | None:
    """The class names that the label column defines, or None."""
    import datasets  # takes seconds to import

    return list(map(str, feature.names)) if isinstance(feature, datasets.ClassLabel) else None


def _match_labels(
    names: Sequence[str], values: Sequence[int], classes: Mapping[str, str], ignore: Sequence[str]
) -> NamedLabels:
    """Number labels in the order of `classes`, which must list all `names` that are not ignored."""
    by_key = {name_key(ours): label for label, ours in enumerate(classes.values())}
    by_key |= {name_key(theirs): label for label, theirs in enumerate(classes)}
    ignored = set(map(name_key, ignore))
    # Only ignored classes keep -1, and `_select_rows` has left out their rows.
    new = np.full(len(names), -1, dtype=np.int64)
    for old, name in enumerate(names):
        if name_key(name) in by_key:
            new[old] = by_key[name_key(name)]
        elif name_key(name) not in ignored:
            hint = did_you_mean(name, list(classes))
            raise UserError(
                f"data: the hub's class '{name}' is not in the catalogue's list.{hint} This is "
                "another data set or a changed one: compare it with 'fedprompt data show'."
            )
    if len(set(new[new >= 0])) < len(classes):
        absent = min(set(range(len(classes))) - set(new.tolist()))
        raise UserError(f"data: the hub's copy has no class '{list(classes)[absent]}'.")
    return tuple(classes.values()), new[np.array(values, dtype=np.int64)]


def _named_labels(
    names: Sequence[str], values: Sequence[int], config: HubKeys, spell: Callable[[str], str]
) -> NamedLabels:
    """Use the labels of a column that defines numbers and names of its classes."""
    # Numbers would make valid but meaningless prompts.
    if not config.class_names and all(name.isdigit() for name in names):
        raise UserError(
            f"data: the labels of '{config.label_column}' have numbers for names; set "
            "data.class_names."
        )
    class_names = config.class_names or [spell(name) for name in names]
    if len(class_names) != len(names):
        raise UserError(
            f"data: data.class_names has {len(class_names)} names, '{config.label_column}' has "
            f"{len(names)} classes: {', '.join(names)}."
        )
    return tuple(class_names), np.array(values, dtype=np.int64)


def _text_labels(
    values: Sequence[str], class_names: Sequence[str], spell: Callable[[str], str]
) -> NamedLabels:
    """Number labels that are texts, in the order of `class_names` or, without it, sorted."""
    texts = sorted(set(values))
    if not class_names:
        names = tuple(spell(text) for text in texts)
        label_of = {text: label for label, text in enumerate(texts)}
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise UserError(f"data: several labels are spellings of '{repeated[0]}'; merge them.")
        return names, np.array([label_of[value] for value in values], dtype=np.int64)
    by_key = {name_key(name): label for label, name in enumerate(class_names)}
    for text in texts:
        if name_key(text) not in by_key:
            hint = did_you_mean(text, list(class_names))
            raise UserError(f"data: label '{text}' is not in data.class_names.{hint}")
    labels_N = np.array([by_key[name_key(value)] for value in values], dtype=np.int64)
    return tuple(class_names), labels_N


def _numbered_labels(values: Sequence[int], config: HubKeys) -> NamedLabels:
    """Use labels that are plain numbers; only the user can name their classes."""
    class_names = config.class_names
    if not class_names:
        raise UserError(
            f"data: column '{config.label_column}' holds numbers without names; set "
            "data.class_names, in label order."
        )
    low, high = min(values), max(values)
    if low < 0 or high >= len(class_names):
        raise UserError(
            f"data: labels run from {low} to {high}, data.class_names has {len(class_names)} "
            f"names; labels must be 0 to {len(class_names) - 1}."
        )
    return tuple(class_names), np.array(values, dtype=np.int64)
