"""Understands a folder of class folders: which of its sub-folders are splits, and which classes.

A wrong guess here would not fail: with splits or whole data sets taken for classes, a run ends with
a plausible result. So a folder that can be read in two ways is refused.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
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
    TRAIN: {"train", "training", "trainval", "trn"},
    TEST: {"test", "testing", "tst"},
    VAL: {"val", "valid", "validation", "validate", "dev", "eval", "evaluation", "holdout"},
}
_BESIDE = "set|data|images|imgs|split|folder"
_NAME = re.compile(rf"(?:{_BESIDE}|\d+)*(.*?)(?:{_BESIDE}|v?\d+)*")
"""A name of a split with the words and numbers that may surround it, without separators."""
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
        images: the images of the splits that are used, sorted by path. The `key` of an image is
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

    Case, separators, numbers (`train2017`, `01_train`) and words such as `set`, `data`, `images`
    and `split` do not matter.
    """
    match = _NAME.fullmatch(re.sub(r"\W+", "", name_key(folder)))
    return next((split for split, names in _SPLITS.items() if match and match[1] in names), None)


def read_folder(root: Path, *, named: bool = False, validation: bool = False) -> Layout:
    """List the images of a folder with class folders, or with splits that contain class folders.

    Args:
        root: the folder.
        named: whether the user lists the classes. Then class folders may hold their images in
            sub-folders only.
        validation: whether the images of a validation split are listed, too.

    Returns:
        Its images, and what else is there.

    Raises:
        UserError: splits or whole data sets would be read as classes, there are fewer than two
            classes, there are no images, or a folder cannot be listed.
    """
    top = subfolders(root)
    splits = _splits(root, top, named=named, validation=validation)
    if validation and not {TEST, VAL} <= set(splits):
        lacking = "test/" if VAL in splits else "val/"
        raise UserError(
            f"data: data.validation=server: {root} has no {lacking} with class folders; add it, or "
            "leave data.validation and set partition.server_validation_fraction."
        )
    left_out = LeftOut()
    unused: list[str] = []
    images: list[Found] = []
    _refuse_linked_twice(root, splits)
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
    known = set(map(name_key, folders))
    for split in (TEST, VAL):
        if split not in splits:
            continue
        where = f"{root}/{splits[split]}"
        extra = [name for name in subfolders(Path(where)) if name_key(name) not in known]
        if extra:
            raise UserError(
                f"data: {where} has {some(extra)}, which {splits[TRAIN]}/ does not have."
            )
        if not any(image.split == split for image in images):
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


def _splits(root: Path, top: Sequence[str], *, named: bool, validation: bool) -> dict[int, str]:
    """The folder of each split that is used; without splits, all of `root` is for training.

    Raises:
        UserError: there is no training split, or the folders can be read in two ways.
    """
    roles = {name: split for name in top if (split := split_of(name)) is not None}
    # A folder that holds images itself, among other classes, is a class called 'train' or 'test'.
    acting = [name for name in roles if _holds_classes(root / name)]
    others = [name for name in top if name not in roles]
    if not roles or (others and not acting):
        # One class may be called 'train'; 'train' and 'test' are hardly both classes.
        if {TRAIN, TEST} <= set(roles.values()) and not named:
            raise UserError(
                f"data: {root} has {some(list(roles))}, which are names of splits, but hold images "
                f"and no class folders, and beside them {some(others)}. Expected {root}/train/"
                "<class>/*.jpg; if all of these folders are classes, list them in "
                "data.class_names."
            )
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
        if split in splits and (split != VAL or validation):
            raise UserError(
                f"data: {root} has {splits[split]}/ and {name}/, which are both names of the "
                f"{_SPLIT_WORDS[split]} split; rename or remove one."
            )
        if (split != VAL or validation) and not subfolders(root / name):
            raise UserError(
                f"data: {root}/{name} has the name of a split, but no class folders with images in "
                f"it; expected {root}/{name}/<class>/*.jpg."
            )
        splits[split] = name
    if TRAIN not in splits:
        raise UserError(
            f"data: {root} has {next(iter(roles))}/ but no train/ with class folders in it."
        )
    used = (TRAIN, TEST, VAL) if validation else (TRAIN, TEST)
    return {split: splits[split] for split in used if split in splits}


def _holds_classes(folder: Path) -> bool:
    """Whether a folder with the name of a split has sub-folders and no images of its own."""
    return bool(subfolders(folder)) and not any(map(is_image, files_in(folder)))


def _refuse_linked_twice(root: Path, splits: Mapping[int, str]) -> None:
    """Refuse a link to a folder that is a class already, of this split or of the other one.

    Raises:
        UserError: two class folders are the same folder.
    """
    known: dict[str, Path] = {}
    for split in splits.values():
        for folder in subfolders(root / split):
            path = root / split / folder
            other = known.setdefault(os.path.realpath(path), path)
            if other != path:
                raise UserError(
                    f"data: {path} and {other} are the same folder, so its images would count "
                    "twice; remove the link."
                )


def _class_images(
    root: Path, split_folder: str, split: int, left_out: LeftOut, unused: list[str], *, named: bool
) -> list[Found]:
    """The images of one split.

    Raises:
        UserError: a class folder contains splits, or no class folder holds images itself.
    """
    place = root / split_folder
    found: list[Found] = []
    direct = 0
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
            direct += path.parent == place / folder
    if not named:
        _refuse_deep(place, [Path(root / image.path) for image in found], direct)
    beside = sum(map(is_image, files_in(place))) if split_folder else 0
    if beside:
        unused.append(f"{beside} images beside the class folders of {split_folder}/")
    return found


def _refuse_deep(place: Path, images: Sequence[Path], direct: int) -> None:
    """Refuse class folders that look like splits or data sets with class folders of their own.

    Args:
        place: the folder with the class folders.
        images: all images in it.
        direct: how many of them lie in a class folder itself, and not deeper.

    Raises:
        UserError: no class folder holds images itself, or most images lie deeper, in folders of the
            same names in several class folders.
    """
    inside = [path.relative_to(place).parts for path in images]
    pairs = {(parts[0], name_key(parts[1])) for parts in inside if len(parts) > 2}
    times = Counter(name for _, name in pairs)
    shared = sorted({p[1] for p in inside if len(p) > 2 and times[name_key(p[1])] > 1})
    # A preview or two beside the class folders of a data set do not make it a class.
    if not images or (direct and (len(shared) < 2 or 2 * direct >= len(images))):
        return
    deep = sorted(path for path, parts in zip(images, inside, strict=True) if len(parts) > 2)
    classes = subfolders(place)
    # One level up from the classes of the larger part of the images.
    nearest = Counter(path.parents[1] for path in deep).most_common(1)[0][0]
    what = (
        f"most images in {place} lie below its class folders, as {deep[0]}, and several of these "
        f"contain the same folders: {some(shared)}"
        if direct
        else f"no folder in {place} holds images itself; they lie deeper, as {deep[0]}"
    )
    advice = [f"If data.root is one level too high, set it to {nearest}"]
    if len(shared) > 1:
        advice.append(f"if {some(classes)} are splits, call them train and test")
    if len(classes) > 1:
        advice.append(f"if {some(classes)} are the classes, list them in data.class_names")
    raise UserError(f"data: {what}. {'; '.join(advice)}.")
