"""Any local image folder: `root/class/*.jpg`, or `root/{train,test}/class/*.jpg`.

Rules:
- Every sub-folder of `root` is a class; images may lie deeper inside it. Names that start with a
  dot or with `__` (`.git`, `__MACOSX`) are ignored, and so are files that are no images by suffix.
- Where `root` holds a folder `train` that has sub-folders and no images of its own, `root` holds
  splits: `train` and, if there is one, `test`. `val`, `valid` and `validation` are left unused,
  with a log line; any other folder beside `train` is an error, not a class.
- Without a `test` folder, `data.test_fraction` of each class is held out, seeded.
- Labels follow the sorted folder names, or `data.class_names` where given; those match folders
  ignoring case, spaces, underscores and hyphens.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fedprompt.config import DataConfig
from fedprompt.data.base import TEST, TRAIN, ImageDataset
from fedprompt.data.cache import digest
from fedprompt.data.images import decode_rgb, hold_out_test, name_key, readable_name
from fedprompt.data.scan import bad_images, memo_path, scan
from fedprompt.errors import UserError, did_you_mean

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
UNUSED_SPLITS = ("val", "valid", "validation")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _File:
    path: str  # relative to root, with forward slashes
    folder: str
    split: int


@dataclass(frozen=True)
class _Opener:
    """Opens image i; a class, not a closure, so that a data set can be pickled."""

    root: Path
    paths: tuple[str, ...]

    def __call__(self, index: int) -> Image.Image:
        path = self.root / self.paths[index]
        try:
            return decode_rgb(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(
                f"data: {path} was readable and no longer is: {error}; start again."
            ) from None


def load(config: DataConfig, seed: int, cache_dir: Path) -> ImageDataset:
    """The data set in the folder `config.root`.

    Raises:
        UserError: no such folder, no classes or images in it, names that do not match, or an
            unreadable image under `on_bad_image: error`.
    """
    assert config.root is not None
    root = Path(config.root).expanduser()
    if not root.is_dir():
        what = "is a file, not a folder" if root.is_file() else "does not exist"
        raise UserError(f"data: {root} {what}; set data.root to a folder root/class/*.jpg.")
    files, folders, has_test = _list_files(root)
    class_names, label_of = _name_classes(folders, config.class_names, root)

    names = [str(root / file.path) for file in files]
    keys = [_key(root, file.path) for file in files]
    memo = memo_path(cache_dir, "folder", str(root.resolve()))
    verdicts = scan(keys, lambda i: (root / files[i].path).read_bytes(), memo, config.title)
    bad = bad_images(names, verdicts, config.on_bad_image, config.title)
    kept = [i for i, verdict in enumerate(verdicts) if verdict.reason is None]

    labels_N = np.array([label_of[files[i].folder] for i in kept], dtype=np.int64)
    split_N = np.array([files[i].split for i in kept], dtype=np.int8)
    trained = {label_of[files[i].folder] for i in kept if files[i].split == TRAIN}
    for folder in folders:
        if label_of[folder] not in trained:
            raise UserError(
                f"data: class folder '{folder}' in {root} has no readable training image; add "
                f"some ({', '.join(SUFFIXES)}) or remove the folder."
            )
    if not has_test:
        split_N = hold_out_test(labels_N, config.test_fraction, seed)
    content = [f"{files[i].path}|{verdicts[i].hash}|{label_of[files[i].folder]}" for i in kept]
    return ImageDataset(
        name=config.title,
        class_names=class_names,
        labels_N=labels_N,
        split_N=split_N,
        domains_N=np.zeros(len(kept), dtype=np.int64),
        domain_names=(config.title,),
        fingerprint=digest("folder", *content),
        open_image=_Opener(root, tuple(files[i].path for i in kept)),
        bad_images=bad,
    )


def _list_files(root: Path) -> tuple[list[_File], list[str], bool]:
    """(all image files sorted by path, class folders sorted, whether there is a test split)."""
    top = _folders(root)
    if "train" in top and _folders(root / "train") and not _images_directly_in(root / "train"):
        unused = [name for name in top if name in UNUSED_SPLITS]
        strange = [name for name in top if name not in ("train", "test", *UNUSED_SPLITS)]
        if strange:
            raise UserError(
                f"data: {root} has train/ and beside it {_some(strange)}; keep only train, test "
                "and val there, or set data.root to the folder that holds the class folders."
            )
        if unused:
            log.info("%s/%s is not used: only train and test are", root, unused[0])
        splits = {"train": TRAIN, "test": TEST} if "test" in top else {"train": TRAIN}
    elif "test" in top and set(top) <= {"test", *UNUSED_SPLITS}:
        raise UserError(f"data: {root} has test/ but no train/ with class folders in it.")
    else:
        splits = {"": TRAIN}
    files = [
        _File(path.relative_to(root).as_posix(), folder, code)
        for split, code in splits.items()
        for folder in _folders(root / split)
        for path in _images_below(root / split / folder)
    ]
    folders = _folders(root / "train") if "train" in splits else top
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
        extra = sorted(set(_folders(root / "test")) - set(folders))
        if extra:
            raise UserError(f"data: {root}/test has {_some(extra)}, which train/ has not.")
        if not any(file.split == TEST for file in files):
            raise UserError(f"data: {root}/test holds no images; fill it or remove it.")
    return sorted(files, key=lambda file: file.path), folders, "test" in splits


def _name_classes(
    folders: Sequence[str], wanted: Sequence[str], root: Path
) -> tuple[tuple[str, ...], dict[str, int]]:
    """(class names in label order, label of each folder)."""
    by_key: dict[str, str] = {}
    for folder in folders:
        twin = by_key.setdefault(name_key(folder), folder)
        if twin != folder:
            raise UserError(
                f"data: folders '{twin}' and '{folder}' in {root} are the same class name; merge "
                "or rename one."
            )
    if not wanted:
        return tuple(readable_name(f) for f in folders), {f: i for i, f in enumerate(folders)}
    wanted_keys = [name_key(name) for name in wanted]
    missing = [n for n, key in zip(wanted, wanted_keys, strict=True) if key not in by_key]
    if missing:
        hint = did_you_mean(missing[0], list(folders))
        raise UserError(f"data: no folder for class '{missing[0]}' in {root}.{hint}")
    extra = [folder for key, folder in by_key.items() if key not in wanted_keys]
    if extra:
        raise UserError(f"data: {root} has {_some(extra)}, not listed in data.class_names.")
    if len(set(wanted_keys)) < len(wanted):
        raise UserError("data: data.class_names lists a class twice.")
    label_of = {by_key[key]: label for label, key in enumerate(wanted_keys)}
    return tuple(name.strip() for name in wanted), label_of


def _folders(parent: Path) -> list[str]:
    try:
        return sorted(p.name for p in parent.iterdir() if _visible(p.name) and p.is_dir())
    except OSError as error:
        raise UserError(f"data: cannot list {parent}: {error.strerror}.") from None


def _images_directly_in(folder: Path) -> bool:
    return any(_is_image(path.name) for path in folder.iterdir())


def _images_below(folder: Path) -> Iterator[Path]:
    for parent, below, names in os.walk(folder):
        below[:] = [name for name in below if _visible(name)]
        yield from (Path(parent) / name for name in names if _is_image(name))


def _visible(name: str) -> bool:
    return not name.startswith((".", "__"))


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def _key(root: Path, path: str) -> str:
    try:
        status = (root / path).stat()
    except OSError:  # a dangling link: reading it will give the reason
        return f"{path}|?"
    return f"{path}|{status.st_size}|{status.st_mtime_ns}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
