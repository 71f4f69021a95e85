"""Understands a folder of class folders: which of its sub-folders are splits, and which classes.

A wrong guess here would not fail: with splits or whole data sets taken for classes, a run ends with
a plausible result. So a folder that can be read in two ways is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedprompt.data.dataset import TEST, TRAIN, VAL
from fedprompt.data.images import name_key
from fedprompt.data.sources.parts.walk import (
    SUFFIXES,
    LeftOut,
    files_in,
    images_below,
    is_image,
    subfolders,
)
from fedprompt.errors import UserError

_SPLITS = {
    TRAIN: {"train", "training", "trainval"},
    TEST: {"test", "testing"},
    VAL: {"val", "valid", "validation", "validate", "dev", "eval", "evaluation", "holdout"},
}
_SPLIT_WORDS = {TRAIN: "train", TEST: "test", VAL: "validation"}


@dataclass(frozen=True)
class Found:
    """One image: its path relative to the root, with forward slashes; its class; its split."""

    path: str
    key: str
    split: int


@dataclass(frozen=True)
class Layout:
    """What a folder contains.

    Attributes:
        images: the images of the training and test split, sorted by path. The `key` of an image is
            the `name_key` of its class folder.
        folders: the class folders, sorted; those of the training split if there are splits.
        has_test: whether there is a folder of test images.
        left_out: the files in class folders that are no images.
        unused: other things that are not read, in words.
    """

    images: tuple[Found, ...]
    folders: tuple[str, ...]
    has_test: bool
    left_out: LeftOut
    unused: tuple[str, ...] = ()


def split_of(folder: str) -> int | None:
    """`TRAIN`, `TEST` or `VAL` if a folder has the usual name of a split, else None.

    Case, separators, a year (`train2017`) and the words `set`, `data` and `images` do not matter.
    """
    key = re.sub(r"(set|data|images|imgs)?\d*$", "", name_key(folder))
    return next((split for split, names in _SPLITS.items() if key in names), None)


def read_folder(root: Path, *, named: bool = False) -> Layout:
    """List the images of a folder with class folders, or with splits that contain class folders.

    Args:
        root: the folder.
        named: whether the user lists the classes. Then class folders may hold their images in
            sub-folders only.

    Returns:
        Its images, and what else is there.

    Raises:
        UserError: splits or whole data sets would be read as classes, there are fewer than two
            classes, there are no images, or a folder cannot be listed.
    """
    top = subfolders(root)
    splits = _splits(root, top)
    left_out = LeftOut()
    unused: list[str] = []
    images: list[Found] = []
    for split, folder in splits.items():
        images += _class_images(root, folder, split, left_out, unused, named=named)
    if not images:
        raise UserError(
            f"data: no images found in {root}; expected {root}/<class>/*.jpg "
            f"(also {', '.join(SUFFIXES[1:])}), or the same under train/ and test/."
            + (f" Other files there: {left_out}." if left_out.suffixes else "")
        )
    folders = subfolders(root / splits[TRAIN])
    if len(folders) < 2:
        raise UserError(
            f"data: {root / splits[TRAIN]} has one class folder, '{folders[0]}'; at least two are "
            "needed."
        )
    if TEST in splits:
        known = set(map(name_key, folders))
        where = f"{root}/{splits[TEST]}"
        extra = [name for name in subfolders(Path(where)) if name_key(name) not in known]
        if extra:
            raise UserError(
                f"data: {where} has {some(extra)}, which {splits[TRAIN]}/ does not have."
            )
        if not any(image.split == TEST for image in images):
            raise UserError(f"data: {where} contains no images; add some or remove it.")
    beside = sum(map(is_image, files_in(root)))
    if beside:
        unused.append(f"{beside} images beside the folders of {root}")
    for folder in top if splits[TRAIN] else ():
        if folder not in splits.values():
            count = sum(1 for _ in images_below(root / folder))
            unused.append(f"{folder}/ with {count} images")
    # Folders are listed in an order that depends on the file system.
    images.sort(key=lambda image: image.path)
    return Layout(tuple(images), tuple(folders), TEST in splits, left_out, tuple(unused))


def some(names: Sequence[str]) -> str:
    """The first three names in quotes, and how many there are more."""
    first = ", ".join(f"'{name}'" for name in names[:3])
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first


def _splits(root: Path, top: Sequence[str]) -> dict[int, str]:
    """The folder of each split that is used; without splits, all of `root` is for training."""
    roles = {name: split for name in top if (split := split_of(name)) is not None}
    # A folder that holds images itself, among other classes, is a class called 'train' or 'test'.
    acting = [name for name in roles if _holds_classes(root / name)]
    others = [name for name in top if name not in roles]
    if not roles or (others and not acting):
        return {TRAIN: ""}
    # A misspelt split would be left out silently, and a class here means that `root` was misread.
    if others:
        raise UserError(
            f"data: {root} has {acting[0]}/ and beside it {some(others)}; keep only the folders of "
            "splits there (train, test, val), or set data.root to the folder that contains the "
            "class folders."
        )
    splits: dict[int, str] = {}
    for name, split in roles.items():
        if split in splits and split != VAL:
            raise UserError(
                f"data: {root} has {splits[split]}/ and {name}/, which are both names of the "
                f"{_SPLIT_WORDS[split]} split; rename or remove one."
            )
        if split != VAL and not subfolders(root / name):
            raise UserError(
                f"data: {root}/{name} has the name of a split, but no class folders with images in "
                f"it; expected {root}/{name}/<class>/*.jpg."
            )
        splits[split] = name
    if TRAIN not in splits:
        raise UserError(
            f"data: {root} has {next(iter(roles))}/ but no train/ with class folders in it."
        )
    return {split: splits[split] for split in (TRAIN, TEST) if split in splits}


def _holds_classes(folder: Path) -> bool:
    """Whether a folder with the name of a split has sub-folders and no images of its own."""
    return bool(subfolders(folder)) and not any(map(is_image, files_in(folder)))


def _class_images(
    root: Path, split_folder: str, split: int, left_out: LeftOut, unused: list[str], *, named: bool
) -> list[Found]:
    """The images of one split.

    Raises:
        UserError: a class folder contains splits, or no class folder holds images itself.
    """
    place = root / split_folder
    found: list[Found] = []
    direct = False
    for folder in subfolders(place):
        inner = [name for name in subfolders(place / folder) if split_of(name) is not None]
        kinds = {split_of(name) for name in inner}
        if TRAIN in kinds and len(kinds) > 1:
            raise UserError(
                f"data: {place / folder} contains {some(inner)}, which are splits: it is a data "
                f"set, not a class. Set data.root to {place / folder}, or move the splits to the "
                f"top: {place}/train/{folder} and {place}/test/{folder}."
            )
        for path in images_below(place / folder, left_out):
            found.append(Found(path.relative_to(root).as_posix(), name_key(folder), split))
            direct = direct or path.parent == place / folder
    if found and not direct and not named:
        first = min(image.path for image in found)
        raise UserError(
            f"data: no folder in {place} holds images itself; they lie deeper, as {root / first}. "
            f"If data.root is one level too high, set it to {(root / first).parents[1]}; if the "
            f"folders {some(subfolders(place))} are the classes, list them in data.class_names."
        )
    beside = sum(map(is_image, files_in(place))) if split_folder else 0
    if beside:
        unused.append(f"{beside} images beside the class folders of {split_folder}/")
    return found
