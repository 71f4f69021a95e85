"""Reads CoOp's split files, `split_zhou_<Name>.json` beside the images.

K. Zhou, J. Yang, C. C. Loy, Z. Liu. Learning to Prompt for Vision-Language Models. IJCV 2022.

A file contains, under train, val and test, one [path, label, class name] per image, with paths
relative to the folder of images. It defines the split and the label order that most papers on
prompt learning use.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fedprompt.data.sources.parts.layouts import SPLITS, Listed, Listing
from fedprompt.errors import UserError

SOURCE = "https://github.com/KaiyangZhou/CoOp (DATASETS.md)"


def find_split(file: str, folders: Sequence[Path]) -> Path | None:
    """The path of a split file in the first of the `folders` that contains it, or None."""
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    return None


def read_split(path: Path, images: Path) -> Listing:
    """Read the images and classes that a split file lists.

    Args:
        path: the split file.
        images: the folder to which the paths in the file are relative.

    Returns:
        The listing, sorted by path. Class keys are the labels as text.

    Raises:
        UserError: the file is not a split file, a label has several names, labels are missing, or
            an image is in several splits.
    """
    try:
        stored = json.loads(path.read_bytes())
        rows = [
            (split, str(where), int(label), str(name))
            for split in SPLITS
            for where, label, name in stored[split]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"data: {path} is no split file ({type(error).__name__}: {error}); fetch it again from "
            f"{SOURCE} or remove it."
        ) from None
    name_of: dict[int, str] = {}
    split_of: dict[str, str] = {}
    for split, where, label, name in rows:
        if name_of.setdefault(label, name) != name:
            raise UserError(
                f"data: {path}: label {label} is both '{name_of[label]}' and '{name}'; fetch the "
                f"file again from {SOURCE}."
            )
        # An image in two splits would be trained on and tested on.
        if split_of.setdefault(where, split) != split:
            raise UserError(
                f"data: {path}: {where} is in {split_of[where]} and in {split}; images would leak."
            )
    if sorted(name_of) != list(range(len(name_of))) or not name_of:
        raise UserError(f"data: {path}: the labels are not 0 to {len(name_of) - 1} without gaps.")
    # The key of a class is its number, because two classes may have the same name.
    listed = [Listed(where, str(label), SPLITS[split]) for split, where, label, _ in rows]
    keys = tuple(str(label) for label in range(len(name_of)))
    names = {str(label): name for label, name in name_of.items()}
    return Listing(images, tuple(sorted(listed, key=lambda item: item.path)), keys, names)
