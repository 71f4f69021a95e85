"""Lists the images and sub-folders of a folder, and counts the files that are no images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fedprompt.errors import UserError

# Formats that Pillow reads in every usual installation, without another program or package.
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".tif", ".tiff", ".webp",
    ".gif", ".jp2", ".j2k", ".j2c", ".jpx", ".avif", ".ppm", ".pgm", ".pbm", ".pnm", ".tga",
)  # fmt: skip
UNREAD = (
    ".heic", ".heif", ".jxl", ".svg", ".psd", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw",
    ".orf", ".rw2", ".raf", ".exr", ".hdr", ".dcm", ".nii", ".npy", ".npz", ".mat", ".h5", ".hdf",
    ".nc", ".img", ".ecw", ".sid", ".vrt", ".zip", ".tar", ".gz", ".7z", ".rar",
)  # fmt: skip
"""Suffixes of files that hold, or may hold, images which are not read. The user is warned."""
_SYSTEM = frozenset(
    {"@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
)
"""Folders that operating systems and network drives create, in lower case."""


@dataclass
class LeftOut:
    """The files of a folder that are not read as images.

    Attributes:
        suffixes: how many files there are of each suffix, in lower case.
    """

    suffixes: Counter[str] = field(default_factory=Counter)

    def add(self, name: str) -> None:
        """Count a file by its name; hidden files are what file managers write, and do not count."""
        if not name.startswith("."):
            self.suffixes[Path(name).suffix.lower() or "without a suffix"] += 1

    def __str__(self) -> str:
        """The counts in words, the most frequent suffix first; empty if there are none."""
        return ", ".join(f"{count} {suffix}" for suffix, count in self.suffixes.most_common())

    @property
    def images(self) -> str:
        """Like the text of the object, for formats of images that are not read."""
        return str(LeftOut(Counter({s: n for s, n in self.suffixes.items() if s in UNREAD})))


def is_image(name: str) -> bool:
    """Whether a file name is not hidden and has the suffix of an image."""
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def is_utf8(name: str) -> bool:
    """Whether a file name is text; Python keeps other bytes of a name as halves of characters."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def subfolders(parent: Path) -> list[str]:
    """The names of the visible folders in `parent`, sorted.

    Folders such as `.git`, `__MACOSX` and `lost+found` are not visible.

    Raises:
        UserError: the folder cannot be listed, or a link in it leads nowhere.
    """
    return sorted(path.name for path in _entries(parent)[0])


def files_in(parent: Path) -> list[str]:
    """The names of all files in `parent`, sorted.

    Raises:
        UserError: the folder cannot be listed, or a link in it leads nowhere.
    """
    return sorted(path.name for path in _entries(parent)[1])


def images_below(folder: Path, left_out: LeftOut | None = None) -> Iterator[Path]:
    """Iterate over all image files in a folder and its visible sub-folders, in no fixed order.

    Linked folders and files are read like any other.

    Args:
        folder: the folder.
        left_out: counts the files that are no images.

    Raises:
        UserError: a folder cannot be listed, a link leads nowhere, or a linked folder contains the
            link.
    """
    yield from _below(folder, folder, (), LeftOut() if left_out is None else left_out)


def _below(folder: Path, link: Path, above: tuple[str, ...], left_out: LeftOut) -> Iterator[Path]:
    """Iterate over the images of `folder`; `link` is the link through which it was reached."""
    place = os.path.realpath(folder)
    if place in above:
        raise UserError(f"data: {link} is a link to a folder that contains it; remove the link.")
    folders, files = _entries(folder)
    for path in files:
        if is_image(path.name):
            yield path
        else:
            left_out.add(path.name)
    for path in folders:
        inner = path if path.is_symlink() else link
        yield from _below(path, inner, (*above, place), left_out)


def _entries(parent: Path) -> tuple[list[Path], list[Path]]:
    """The visible folders in a folder, and its files."""
    folders, files = [], []
    try:
        paths = list(parent.iterdir())
    except OSError as error:
        raise UserError(f"data: cannot list {parent}: {error.strerror}.") from None
    for path in paths:
        hidden = path.name.startswith(".")
        # Such a name can neither be stored in a run folder nor be hashed.
        if not hidden and not is_utf8(path.name):
            raise UserError(
                f"data: the name of {os.fsencode(path.name)!r} in {parent} is not UTF-8; rename it."
            )
        if os.path.isdir(path):
            if not path.name.startswith((".", "__")) and path.name.lower() not in _SYSTEM:
                folders.append(path)
            continue
        # A link named like an image is judged when it is opened, so that `on_bad_image` decides.
        if os.path.islink(path) and not is_image(path.name) and not os.path.exists(path):
            raise UserError(
                f"data: {path} is a link to {os.readlink(path)}, which does not exist; repair or "
                "remove it."
            )
        files.append(path)
    return folders, files
