"""A folder of images with several labels each, which stand in tables as MLRSNet's do.

    root/Labels/<group>.csv          image,airplane,airport,...   one row of 0 and 1 per image
    root/Images/<group>/<image>      or root/Images/<image>

Rules:
- All tables have the same columns: the image's file name, then one per label. In a table, an image
  stands once, and it has one label at least.
- Names of labels are those of the columns, made readable, or `data.class_names` in their order.
- `Labels` and `Images` may be spelt in lower case.
- No split is read: `data.test_fraction` of the images of each rarest label is held out, drawn with
  the seed.

Source of the format: X. Qi et al., MLRSNet, ISPRS Journal of Photogrammetry and Remote Sensing
2020, as published on Mendeley Data; its 46 tables have 60 labels, and `<group>` is the category.
How we differ from the public code of FedMPT (CVPR 2026): that code drops all images with fewer than
seven labels, and trains on the first half of the categories and tests on the other one.

Suffixes: N images, C labels.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from fedprompt.config.fields import option
from fedprompt.data.dataset import TRAIN, ImageDataset
from fedprompt.data.images import name_key, readable_name
from fedprompt.data.label_sets import rarest_labels, with_targets
from fedprompt.data.sources.base import DataSource, SplitImagesConfig
from fedprompt.data.sources.parts.image_files import ImageFile, files_dataset
from fedprompt.errors import UserError

VALUES = {"0": False, "1": True, "0.0": False, "1.0": True}


@dataclass(frozen=True)
class LabelTablesConfig(SplitImagesConfig):
    """Images of a folder on this machine, whose labels stand in tables."""

    source: Literal["label_tables"] = option("label_tables", "the data source")
    root: str | None = option(
        None, "the folder: root/Labels/*.csv and root/Images/*/*.jpg", path=True
    )

    @property
    def multi_label(self) -> bool:
        """An image has several labels."""
        return True

    def check(self) -> None:
        """Refuse a section without a folder."""
        super().check()
        if not self.root:
            raise UserError("source 'label_tables' needs 'root', e.g. data.root=/path/to/MLRSNet.")


@dataclass(frozen=True)
class _Row:
    """One image: its path below the folder of images, and which labels it has."""

    path: str
    labels: tuple[bool, ...]


class LabelTables(DataSource):
    """One table of labels per group of images."""

    name = "label_tables"
    Config = LabelTablesConfig

    @staticmethod
    def load(config: LabelTablesConfig, seed: int, cache_dir: Path) -> ImageDataset:
        """Open the images that the tables list.

        Args:
            config: the folder and, optionally, the names of the labels.
            seed: decides which images are held out for testing.
            cache_dir: folder that stores hashes of the images between runs.

        Returns:
            The images, sorted by path, with their labels.

        Raises:
            UserError: a folder is missing, a table is not as described, or an image is missing or
                unreadable while `on_bad_image` is `error`.
        """
        assert config.root is not None
        root = Path(config.root).expanduser()
        tables, images = _folder(root, "Labels"), _folder(root, "Images")
        columns, rows = _read_tables(tables, images)
        names = _names(columns, config.class_names, tables)
        rarest_N = rarest_labels(np.array([row.labels for row in rows], dtype=bool))
        dataset = files_dataset(
            config,
            images,
            [ImageFile(row.path, int(c), TRAIN) for row, c in zip(rows, rarest_N, strict=True)],
            names,
            (config.title,),
            test_fraction=config.test_fraction,
            seed=seed,
            cache_dir=cache_dir,
        )
        # Images that cannot be read may have been left out.
        labels_of = {row.path: row.labels for row in rows}
        targets_NC = np.array([labels_of[name] for name in dataset.image_names], dtype=bool)
        dataset = with_targets(dataset, names, targets_NC.reshape(-1, len(names)))
        return replace(dataset, notes=(_understood(dataset, root),))


def _folder(root: Path, name: str) -> Path:
    for spelling in (name, name.lower()):
        if (root / spelling).is_dir():
            return root / spelling
    raise UserError(
        f"data: {root} has no folder '{name}'; set data.root to a folder with Labels/*.csv and "
        "Images/*/*.jpg."
    )


def _read_tables(tables: Path, images: Path) -> tuple[tuple[str, ...], list[_Row]]:
    """The names of the columns, and the rows of all tables, sorted by path."""
    columns: tuple[str, ...] = ()
    rows: dict[str, _Row] = {}
    paths = sorted(tables.glob("*.csv"))
    for path in paths:
        header, listed = _read_table(path)
        if columns and header != columns:
            raise UserError(
                f"data: the columns of {path} are not those of {paths[0].name}; all tables must "
                "have the same labels in the same order."
            )
        columns = header
        own = images / path.stem
        folder = f"{path.stem}/" if own.is_dir() else ""
        for name, labels in listed:
            row = _Row(f"{folder}{name}", labels)
            if rows.setdefault(row.path, row) is not row:
                raise UserError(f"data: {path} lists image '{name}' twice; leave one row.")
    if not rows:
        raise UserError(f"data: {tables} has no table *.csv with images.")
    return columns, [rows[path] for path in sorted(rows)]


def _read_table(path: Path) -> tuple[tuple[str, ...], Iterator[tuple[str, tuple[bool, ...]]]]:
    """The labels of one table, and its images."""
    try:
        # Spreadsheet programs write a byte-order mark.
        lines = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"data: {path} cannot be read as a table: {error}.") from None
    header = tuple(cell.strip() for cell in lines[0]) if lines else ()
    # Empty columns at the end come from spreadsheet programs as well.
    while header and not header[-1]:
        header = header[:-1]
    if len(header) < 3 or not all(header[1:]):
        raise UserError(
            f"data: {path} does not begin with 'image,<label>,<label>,...' of two labels or more."
        )
    return header[1:], _images(path, header[1:], lines[1:])


def _images(
    path: Path, columns: Sequence[str], lines: Sequence[Sequence[str]]
) -> Iterator[tuple[str, tuple[bool, ...]]]:
    for number, line in enumerate(lines, start=2):
        if not any(cell.strip() for cell in line):
            continue
        name, cells = line[0].strip(), [cell.strip() for cell in line[1 : len(columns) + 1]]
        labels = tuple(VALUES[cell] for cell in cells if cell in VALUES)
        # A cell too many has moved the others, or belongs to a label without a name.
        beyond = any(cell.strip() for cell in line[len(columns) + 1 :])
        if not name or len(labels) != len(columns) or beyond:
            raise UserError(
                f"data: line {number} of {path} must be an image and {len(columns)} numbers, "
                "each 0 or 1."
            )
        # Written otherwise, one image could be listed twice, or lie outside of the folder.
        if "\0" in name or {"", ".", ".."} & set(name.split("/")):
            raise UserError(
                f"data: line {number} of {path}: {name!r} is no plain path below the folder of "
                "images; write it like 'beach_1.jpg'."
            )
        if not any(labels):
            raise UserError(
                f"data: line {number} of {path}: image '{name}' has no label; leave it out."
            )
        yield name, labels


def _names(columns: Sequence[str], wanted: Sequence[str], tables: Path) -> tuple[str, ...]:
    """The labels' names in the order of the columns."""
    if wanted and len(wanted) != len(columns):
        raise UserError(
            f"data: data.class_names has {len(wanted)} names, the tables in {tables} have "
            f"{len(columns)} labels."
        )
    names = tuple(wanted) or tuple(readable_name(column) for column in columns)
    keys = [name_key(name) for name in names]
    for i, key in enumerate(keys):
        if key in keys[:i]:
            raise UserError(f"data: two labels of the tables in {tables} are called '{names[i]}'.")
    return names


def _understood(dataset: ImageDataset, root: Path) -> str:
    assert dataset.targets_NC is not None
    on_image = dataset.targets_NC.sum(axis=1)
    return (
        f"{root}: {len(dataset)} images with {len(dataset.class_names)} labels, "
        f"{on_image.mean():.1f} on an image (at most {on_image.max(initial=0)}); "
        f"{int((dataset.split_N != TRAIN).sum())} images for testing, held out with the seed"
    )
