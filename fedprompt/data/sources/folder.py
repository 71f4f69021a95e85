"""A local folder of images: `root/class/*.jpg`, or `root/{train,test}/class/*.jpg`.

Rules:
- Every sub-folder of `root` is a class. Images may also lie deeper inside it, but if no class
  folder holds images itself, or most images lie in folders that several class folders have in
  common, `root` is probably one level too high and is refused, unless `data.class_names` lists the
  folders. Folders of the system (`.git`, `__MACOSX`, `lost+found`, `@eaDir`) are ignored.
- Folders with the usual names of splits (`Train`, `testing`, `val`; see
  `parts.folder_layout.split_of`) that contain class folders are splits. `train` is needed, `test`
  optional, and a validation split is not used, unless `data.validation=server` gives it to the
  server. Any other folder beside them is an error, not a class.
- Without a `test` folder, `data.test_fraction` of each class is held out, drawn with the seed.
- Labels follow the sorted folder names, or `data.class_names` if set. Class names match folder
  names without regard to case, spaces, underscores, hyphens and the Unicode form of letters.
- What was understood, and which files were left out, is reported in one line.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fedprompt.config.fields import option
from fedprompt.data.dataset import TEST, TRAIN, VAL, ImageDataset
from fedprompt.data.images import name_key, readable_name
from fedprompt.data.sources.base import DataSource, SplitImagesConfig
from fedprompt.data.sources.parts.folder_layout import Layout, read_folder, some
from fedprompt.data.sources.parts.image_files import ImageFile, files_dataset
from fedprompt.data.sources.parts.walk import SUFFIXES
from fedprompt.errors import UserError, did_you_mean

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderConfig(SplitImagesConfig):
    """A folder of images on this machine."""

    source: Literal["folder"] = option("folder", "the data source")
    root: str | None = option(
        None, "the folder: root/class/*.jpg or root/{train,test}/class/*.jpg", path=True
    )
    validation: Literal["unused", "server"] = option(
        "unused",
        "what to do with root/val/class/*.jpg: leave it out, or give it to the server as its "
        "validation images",
    )

    @property
    def official_validation(self) -> bool:
        """Whether the server's validation images are those in `val`."""
        return self.validation == "server"

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
        layout = read_folder(
            root, named=bool(config.class_names), validation=config.official_validation
        )
        folders = layout.folders
        class_names, label_of = _name_classes(folders, config.class_names, root)
        dataset = files_dataset(
            config,
            root,
            [ImageFile(image.path, label_of[image.key], image.split) for image in layout.images],
            class_names,
            (config.title,),
            test_fraction=None if layout.has_test else config.test_fraction,
            seed=seed,
            cache_dir=cache_dir,
        )
        # A class without training images would be tested but never learned.
        trained = set(dataset.labels_N[dataset.split_N == TRAIN].tolist())
        for folder in folders:
            if label_of[name_key(folder)] not in trained:
                raise UserError(
                    f"data: class folder '{folder}' in {root} has no readable training image; add "
                    f"some ({', '.join(SUFFIXES)}) or remove the folder."
                )
        if layout.left_out.images:
            log.warning("%s: not read: %s in %s", config.title, layout.left_out.images, root)
        return replace(dataset, notes=(_understood(dataset, layout, root),))


def _name_classes(
    folders: Sequence[str], class_names: Sequence[str], root: Path
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class names in label order, and the label of each folder's `name_key`.

    Without `class_names`, labels are in the order of the folders.
    """
    by_key: dict[str, str] = {}
    for folder in folders:
        twin = by_key.setdefault(name_key(folder), folder)
        if twin != folder:
            raise UserError(
                f"data: folders '{twin}' and '{folder}' in {root} are the same class name; merge "
                "or rename one."
            )
    if not class_names:
        names = tuple(readable_name(folder) for folder in folders)
        return names, {name_key(folder): label for label, folder in enumerate(folders)}
    name_keys = [name_key(name) for name in class_names]
    missing = [n for n, key in zip(class_names, name_keys, strict=True) if key not in by_key]
    if missing:
        hint = did_you_mean(missing[0], list(folders))
        raise UserError(f"data: no folder for class '{missing[0]}' in {root}.{hint}")
    extra = [folder for key, folder in by_key.items() if key not in name_keys]
    if extra:
        raise UserError(f"data: {root} has {some(extra)}, not listed in data.class_names.")
    if len(set(name_keys)) < len(class_names):
        raise UserError("data: data.class_names lists a class twice.")
    label_of = {key: label for label, key in enumerate(name_keys)}
    return tuple(name.strip() for name in class_names), label_of


def _understood(dataset: ImageDataset, layout: Layout, root: Path) -> str:
    """One line on how a folder was read."""
    trained, tests, chosen_on = (int((dataset.split_N == s).sum()) for s in (TRAIN, TEST, VAL))
    names = ", ".join(dataset.class_names[:4]) + (", ..." if len(dataset.class_names) > 4 else "")
    how = "in a folder of their own" if layout.has_test else "held out with the seed"
    line = (
        f"{root}: {len(dataset.class_names)} classes ({names}), {len(dataset)} images, "
        f"{trained} for training and {tests} for testing ({how})"
    ) + (f", {chosen_on} for validation" if chosen_on else "")
    left_out = [*layout.unused, *([str(layout.left_out)] if layout.left_out.suffixes else [])]
    return f"{line}; not used: {', '.join(left_out)}" if left_out else line
