"""Reads the splits of a Hugging Face data set.

Images stay encoded until they are opened; labels and domains become plain lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt.data.dataset import TEST, TRAIN, VAL
from fedprompt.data.images import name_key
from fedprompt.data.sources.parts.hub_keys import HubKeys
from fedprompt.data.sources.parts.verdicts import Stamp, stamp_of
from fedprompt.errors import UserError, did_you_mean
from fedprompt.files import read_regular
from fedprompt.hub import stay_offline_if_unreachable


@dataclass(frozen=True)
class Part:
    """One split of the data set.

    Attributes:
        split: name of the split.
        code: `TRAIN`, `TEST` or `VAL`.
        images: a `datasets.Dataset` with the image column only, which is not decoded.
        column: name of that column.
        labels: the label of each row, as the column stores it.
        domains: the domain of each row by name; empty if there is no domain column.
        label_feature: the `datasets` feature of the label column.
    """

    split: str
    code: int
    images: Any
    column: str
    labels: list[Any]
    domains: list[Any]
    label_feature: Any

    def read(self, row: int) -> bytes:
        """Read the encoded image of one row.

        Raises:
            ValueError: the row has no image.
            OSError: the row refers to a file that cannot be read.
        """
        value = self.images[row][self.column]
        if value is None:
            raise ValueError("the row holds no image")
        data = value["bytes"]
        return bytes(data) if data is not None else read_regular(Path(value["path"]))

    def names(self) -> list[str]:
        """One name per row: its number, followed by the path of its file if it is one.

        The fingerprint of the split covers stored bytes, so these cannot change under their number.
        """
        names: list[str] = []
        # In Arrow's columns, the presence of bytes can be tested without loading the images.
        for chunk in self.images.with_format("arrow")[:].column(self.column).chunks:
            has_bytes = chunk.field("bytes").is_valid().to_pylist()
            paths = chunk.field("path").to_pylist()
            for stored, path in zip(has_bytes, paths, strict=True):
                row = str(len(names))
                names.append(row if stored else f"{row}|{path or ''}")
        return names


def stamp_of_row(name: str) -> Stamp | None:
    """The stamp of a row with this name; see `Part.names`."""
    _, is_file, path = name.partition("|")
    return stamp_of(Path(path)) if is_file else ()


def load_splits(config: HubKeys) -> dict[str, Any]:
    """Load all splits of a data set.

    Args:
        config: id or folder of the data set, its configuration and its revision.

    Returns:
        A `datasets.Dataset` for every split name.

    Raises:
        UserError: there is no such folder, or the hub or the folder cannot be read.
    """
    import datasets  # takes seconds to import

    assert config.hub_id is not None
    folder = Path(config.hub_id).expanduser()
    # An id on the hub has one slash at most; anything else must be a path. Without this check, a
    # mistyped path would be looked up on the hub.
    if not folder.exists() and (
        config.hub_id.startswith(("/", ".", "~")) or config.hub_id.count("/") > 1
    ):
        raise UserError(f"data: no folder {folder}; set data.hub_id to a folder or a hub id.")
    try:
        # `load_dataset` refuses a folder that `save_to_disk` wrote.
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
        else:
            if not folder.is_dir():
                stay_offline_if_unreachable()
            target = str(folder) if folder.is_dir() else config.hub_id
            loaded = datasets.load_dataset(
                target, name=config.hub_config, revision=config.hub_revision
            )
    except Exception as error:  # from a broken Parquet file to a failed name look-up
        raise UserError(_load_failure(config, folder, error)) from None
    # A single split that was saved by itself has no name, so it takes the configured one.
    if isinstance(loaded, datasets.Dataset):
        return {config.train_split or config.test_split or "train": loaded}
    return dict(loaded)


def _load_failure(config: HubKeys, folder: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if folder.is_dir():
        return f"data: cannot load the data set in {folder}: {reason}"
    if "BuilderConfig" in reason:
        return f"data: data.hub_config: {reason}"
    return (
        f"data: cannot load '{config.hub_id}' from the hub: {reason.rstrip('.')}. Check the name, "
        "and log in if access is restricted. Without a network, load the data set on another "
        "machine, save it with save_to_disk, copy the folder and set data.hub_id=/path/to/folder."
    )


def read_parts(splits: dict[str, Any], config: HubKeys, ignore: Sequence[str]) -> list[Part]:
    """Read the splits that `config` names.

    Args:
        splits: the `datasets.Dataset` of every split, from `load_splits`.
        config: names of splits, columns and domains.
        ignore: names of classes whose rows are left out.

    Returns:
        The splits to train on, then those to test on, then the server's validation images.

    Raises:
        UserError: a split or column does not exist, or a split is named twice.
    """
    names = [
        ("train_split", config.train_split, TRAIN),
        ("test_split", config.test_split, TEST),
        ("validation_split", config.validation_split, VAL),
    ]
    parts: list[Part] = []
    for key, value, code in names:
        for name in (piece.strip() for piece in value.split("+")) if value is not None else ():
            if name not in splits:
                hint = did_you_mean(name, list(splits))
                raise UserError(
                    f"data: data.{key}: no split '{name}'; there are: {', '.join(splits)}.{hint}"
                )
            if any(part.split == name for part in parts):
                raise UserError(
                    f"data: split '{name}' is used twice; its images would be in two parts."
                )
            parts.append(_read_part(splits[name], name, code, config, ignore))
    return parts


def _read_part(
    split: Any, name: str, code: int, config: HubKeys, ignore: Sequence[str] = ()
) -> Part:
    import datasets

    columns = {"image_column": config.image_column, "label_column": config.label_column}
    if config.domain_column is not None:
        columns["domain_column"] = config.domain_column
    for key, column in columns.items():
        if column not in split.features:
            hint = did_you_mean(column, list(split.features))
            raise UserError(
                f"data: data.{key}: no column '{column}' in split '{name}'; there are: "
                f"{', '.join(split.features)}.{hint}"
            )
    split = _select_rows(split, config, ignore)
    try:
        # Images stay encoded until they are opened, so that a broken one can be named by its row.
        images = split.select_columns([config.image_column]).cast_column(
            config.image_column, datasets.Image(decode=False)
        )
    except (TypeError, ValueError, NotImplementedError):  # Arrow's errors are ValueErrors
        raise UserError(
            f"data: data.image_column: '{config.image_column}' holds "
            f"{split.features[config.image_column]}, not images."
        ) from None
    return Part(
        split=name,
        code=code,
        images=images,
        column=config.image_column,
        labels=_values(split, config.label_column),
        domains=_names(split, config.domain_column) if config.domain_column else [],
        label_feature=split.features[config.label_column],
    )


def _select_rows(split: Any, config: HubKeys, ignore: Sequence[str]) -> Any:
    """Select the rows of the domains in `data.domains`, without those of ignored classes."""
    mask = np.ones(len(split), dtype=bool)
    if ignore:
        ignored = set(map(name_key, ignore))
        labels = _names(split, config.label_column)
        mask &= np.array([name_key(str(label)) not in ignored for label in labels], dtype=bool)
    if config.domains and config.domain_column is not None:
        values = [str(value) for value in _names(split, config.domain_column)]
        known = sorted(set(values))
        keys = {name_key(value) for value in known}
        for name in config.domains:
            if name_key(name) not in keys:
                raise UserError(
                    f"data: data.domains: no domain '{name}'.{did_you_mean(name, known)}"
                )
        selected = set(map(name_key, config.domains))
        mask &= np.array([name_key(value) in selected for value in values], dtype=bool)
    # Selecting adds a table of indices, through which every later access would go.
    return split if mask.all() else split.select(np.flatnonzero(mask))


def _values(split: Any, column: str) -> list[Any]:
    # A saved data set may have a format, e.g. PyTorch's; without one, values are plain Python.
    values: list[Any] = split.select_columns([column]).with_format(None)[:][column]
    return values


def _names(split: Any, column: str) -> list[Any]:
    """The values of a column; numbers of named classes are replaced by the names."""
    import datasets

    values, feature = _values(split, column), split.features[column]
    if not isinstance(feature, datasets.ClassLabel):
        return values
    return [None if value in (None, -1) else feature.names[value] for value in values]
