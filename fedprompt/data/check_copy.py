"""Compare a folder with what the catalogue says of the data set, without opening images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedprompt.data.catalogue import Entry
from fedprompt.data.dataset import TEST, TRAIN, VAL
from fedprompt.data.images import name_key
from fedprompt.data.sources.parts import cifar
from fedprompt.data.sources.parts.layouts import Listing
from fedprompt.data.sources.parts.published import list_copy, open_copy

SHOWN = 5


@dataclass(frozen=True)
class Row:
    """One thing that was compared; `stated` is None where the entry is silent."""

    what: str
    stated: int | None
    found: int

    @property
    def ok(self) -> bool:
        """Whether the folder has what is stated."""
        return self.stated is None or self.stated == self.found


@dataclass(frozen=True)
class Finding:
    """What a folder holds: counts, and problems as text."""

    split_source: str
    rows: tuple[Row, ...]
    problems: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether the folder is what the entry describes."""
        return not self.problems and all(row.ok for row in self.rows)


def check(found: Entry, root: Path, split: str = "auto") -> Finding:
    """Classes, images and splits in the folder `root` against the entry.

    Raises:
        UserError: the folder cannot be read as this data set at all.
    """
    copy = open_copy(found, root)
    if found.layout["reader"] == "cifar_binary":
        records = cifar.read_records(copy)
        sizes = np.bincount(records.labels_N, minlength=found.num_classes)
        empty = [name for name, size in zip(found.classes, sizes, strict=True) if not size]
        return Finding(
            found.split.kind,
            _rows(found, int((sizes > 0).sum()), _split_counts(records.split_N.tolist()), False),
            tuple(_first(f"no image of class '{name}'" for name in empty)),
        )
    listing, source, coop = list_copy(copy, split)
    keys = {item.key for item in listing.listed}
    rows = _rows(found, len(keys), _split_counts([item.split for item in listing.listed]), coop)
    for domain in copy.domains:
        count = sum(item.domain == domain for item in listing.listed)
        rows += (Row(f"images of domain {found.domains[domain]}", None, count),)
    problems = [] if coop else _class_problems(found, listing, keys)
    missing = [item.path for item in listing.listed if not (listing.images / item.path).is_file()]
    problems += _first(f"missing file: {path}" for path in missing)
    return Finding(source, rows, tuple(problems))


def _class_problems(found: Entry, listing: Listing, with_images: set[str]) -> list[str]:
    """Classes that should not be there, or should and are not, or are empty."""
    theirs = {name_key(key): key for key in found.classes or listing.keys}
    own = {name_key(other): name_key(key) for other, key in found.spellings.items()}
    # A folder by its name, or by the authors' name for it.
    key_of = {key: own.get(name_key(key), name_key(key)) for key in listing.keys}
    there = set(key_of.values())
    filled = {key_of[key] for key in with_images}
    return [
        *_first(f"unknown class '{key}'" for key in listing.keys if key_of[key] not in theirs),
        *_first(f"no class '{name}'" for key, name in theirs.items() if key not in there),
        *_first(
            f"no image of class '{name}'" for key, name in theirs.items() if key in there - filled
        ),
    ]


def _split_counts(splits: list[int | None]) -> dict[int | None, int]:
    return {code: splits.count(code) for code in (None, TRAIN, VAL, TEST)}


def _rows(
    found: Entry, classes: int, counts: Mapping[int | None, int], coop: bool
) -> tuple[Row, ...]:
    stated = found.coop_split if coop and found.coop_split is not None else found.split
    parts = (stated.train, stated.val, stated.test)
    total = sum(part or 0 for part in parts) if coop else found.images
    rows = [
        Row("classes with images", found.num_classes, classes),
        Row("images", total, sum(counts.values())),
    ]
    for name, code, part in zip(
        ("train", "validation", "test"), (TRAIN, VAL, TEST), parts, strict=True
    ):
        if counts[code] or part:
            rows.append(Row(f"{name} images", part, counts[code]))
    return tuple(rows)


def _first(lines: Iterable[str]) -> list[str]:
    """The first few lines, and how many there are more."""
    whole = list(lines)
    more = len(whole) - SHOWN
    return whole[:SHOWN] + ([f"and {more} more like the last"] if more > 0 else [])
