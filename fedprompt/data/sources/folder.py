"""A local folder of images: `root/class/*.jpg`, or `root/{train,test}/class/*.jpg`.

Rules:
- Every sub-folder of `root` is a class; images may lie deeper inside it. Folders whose names start
  with a dot or with `__` (`.git`, `__MACOSX`) are ignored, and so are files without the suffix of
  an image.
- If `root` contains a folder `train` with sub-folders and no images directly in it, `root` contains
  splits: `train` and, optionally, `test`. Folders `val`, `valid` and `validation` are not used,
  which is logged; any other folder beside `train` is an error, not a class.
- Without a `test` folder, `data.test_fraction` of each class is held out, drawn with the seed.
- Labels follow the sorted folder names, or `data.class_names` if set. Class names match folder
  names without regard to case, spaces, underscores and hyphens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedprompt.config.fields import option
from fedprompt.data.dataset import TEST, TRAIN, ImageDataset
from fedprompt.data.images import name_key, readable_name
from fedprompt.data.sources.base import DataSource, SplitImagesConfig
from fedprompt.data.sources.parts.image_files import (
    SUFFIXES,
    ImageFile,
    files_dataset,
    images_below,
    is_image,
    subfolders,
)
from fedprompt.errors import UserError, did_you_mean

UNUSED_SPLITS = ("val", "valid", "validation")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderConfig(SplitImagesConfig):
    """A folder of images on this machine."""

    source: Literal["folder"] = option("folder", "the data source")
    root: str | None = option(
        None, "the folder: root/class/*.jpg or root/{train,test}/class/*.jpg", path=True
    )

    def check(self) -> None:
        """Refuse a section without a folder."""
        super().check()
        if not self.root:
            raise UserError("source 'folder' needs 'root', e.g. data.root=/path/to/images.")


class Folder(DataSource):
    """One folder per class, or one folder per split with one per class inside."""

    name = "folder"
    Config = FolderConfig

    @staticmethod
    def load(config: FolderConfig, seed: int, cache_dir: Path) -> ImageDataset:
        """Open the images below `config.root`.

        Args:
            config: the folder and, optionally, the class names.
            seed: decides which images are held out if there is no `test` folder.
            cache_dir: folder that stores hashes of the images between runs.

        Returns:
            The images, sorted by path.

        Raises:
            UserError: the folder does not exist or contains no classes or images, class names do
                not match, or an image is unreadable while `on_bad_image` is `error`.
        """
        assert config.root is not None
        root = Path(config.root).expanduser()
        if not root.is_dir():
            what = "is a file, not a folder" if root.is_file() else "does not exist"
            raise UserError(f"data: {root} {what}; set data.root to a folder root/class/*.jpg.")
        files, folders, has_test = _list_files(root)
        class_names, label_of = _name_classes(folders, config.class_names, root)
        dataset = files_dataset(
            config,
            root,
            [ImageFile(file.path, label_of[file.folder], file.split) for file in files],
            class_names,
            (config.title,),
            test_fraction=None if has_test else config.test_fraction,
            seed=seed,
            cache_dir=cache_dir,
        )
        # A class without training images would be tested but never learned.
        trained = set(dataset.labels_N[dataset.split_N == TRAIN].tolist())
        for folder in folders:
            if label_of[folder] not in trained:
                raise UserError(
                    f"data: class folder '{folder}' in {root} has no readable training image; add "
                    f"some ({', '.join(SUFFIXES)}) or remove the folder."
                )
        return dataset


@dataclass(frozen=True)
class _File:
    path: str  # relative to root, with forward slashes
    folder: str
    split: int


def _list_files(root: Path) -> tuple[list[_File], list[str], bool]:
    """List (all image files by path, class folders by name, whether there is a test split)."""
    top = subfolders(root)
    # A folder with images directly in it is a class that happens to be called 'train'.
    if "train" in top and subfolders(root / "train") and not _images_directly_in(root / "train"):
        unused = [name for name in top if name in UNUSED_SPLITS]
        unexpected = [name for name in top if name not in ("train", "test", *UNUSED_SPLITS)]
        # A misspelt split would be left out silently, and a class here means `root` was misread.
        if unexpected:
            raise UserError(
                f"data: {root} has train/ and beside it {_some(unexpected)}; keep only train, test "
                "and val there, or set data.root to the folder that contains the class folders."
            )
        if unused:
            log.info("%s/%s is not used; only train and test are", root, unused[0])
        splits = {"train": TRAIN, "test": TEST} if "test" in top else {"train": TRAIN}
    # Otherwise 'test' would be read as a class, and all test images would be trained on.
    elif "test" in top and set(top) <= {"test", *UNUSED_SPLITS}:
        raise UserError(f"data: {root} has test/ but no train/ with class folders in it.")
    else:
        splits = {"": TRAIN}
    files = [
        _File(path.relative_to(root).as_posix(), folder, code)
        for split, code in splits.items()
        for folder in subfolders(root / split)
        for path in images_below(root / split / folder)
    ]
    folders = subfolders(root / "train") if "train" in splits else top
    if not folders or not files:
        raise UserError(
            f"data: no images found in {root}; expected {root}/<class>/*.jpg "
            f"(also {', '.join(SUFFIXES[1:])}), or the same under train/ and test/."
        )
    if len(folders) < 2:
        raise UserError(
            f"data: {root} has one class folder, '{folders[0]}'; at least two are needed."
        )
    if "test" in splits:
        extra = sorted(set(subfolders(root / "test")) - set(folders))
        if extra:
            raise UserError(f"data: {root}/test has {_some(extra)}, which train/ does not have.")
        if not any(file.split == TEST for file in files):
            raise UserError(f"data: {root}/test contains no images; add some or remove it.")
    # `os.walk` lists files in an order that depends on the file system.
    return sorted(files, key=lambda file: file.path), folders, "test" in splits


def _name_classes(
    folders: Sequence[str], class_names: Sequence[str], root: Path
) -> tuple[tuple[str, ...], dict[str, int]]:
    """(class names in label order, label of each folder); without `class_names`, folder order."""
    by_key: dict[str, str] = {}
    for folder in folders:
        twin = by_key.setdefault(name_key(folder), folder)
        if twin != folder:
            raise UserError(
                f"data: folders '{twin}' and '{folder}' in {root} are the same class name; merge "
                "or rename one."
            )
    if not class_names:
        return tuple(readable_name(f) for f in folders), {f: i for i, f in enumerate(folders)}
    name_keys = [name_key(name) for name in class_names]
    missing = [n for n, key in zip(class_names, name_keys, strict=True) if key not in by_key]
    if missing:
        hint = did_you_mean(missing[0], list(folders))
        raise UserError(f"data: no folder for class '{missing[0]}' in {root}.{hint}")
    extra = [folder for key, folder in by_key.items() if key not in name_keys]
    if extra:
        raise UserError(f"data: {root} has {_some(extra)}, not listed in data.class_names.")
    if len(set(name_keys)) < len(class_names):
        raise UserError("data: data.class_names lists a class twice.")
    label_of = {by_key[key]: label for label, key in enumerate(name_keys)}
    return tuple(name.strip() for name in class_names), label_of


def _images_directly_in(folder: Path) -> bool:
    return any(is_image(path.name) for path in folder.iterdir())


def _some(names: Sequence[str]) -> str:
    first = ", ".join(f"'{name}'" for name in names[:3])
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first
