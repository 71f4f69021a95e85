"""Hugging Face data sets, from the hub or from a local folder.

`data.hub_id` is a hub id, or a folder: one written by `save_to_disk`, or one that `load_dataset`
understands (Parquet files, an image folder). `train_split` and `test_split` may join splits with
`+`, e.g. `train+validation`; `train_split: null` makes all images test images. Images stay encoded
until they are opened, so that a broken one can be named by its split and row. Suffix: N images.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedprompt.config.schema import DataConfig
from fedprompt.data.dataset import TEST, TRAIN, ImageDataset
from fedprompt.data.features.cache import digest
from fedprompt.data.images import decode_rgb, hold_out_test, name_key, readable_name
from fedprompt.data.sources.integrity import Verdict, bad_images, memo_path, scan
from fedprompt.errors import UserError, did_you_mean

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Part:
    """One split: encoded images, and the columns we need as plain lists."""

    split: str
    code: int  # TRAIN or TEST
    images: Any  # datasets.Dataset with one column, not decoded
    column: str
    labels: list[Any]
    domains: list[Any]
    label_feature: Any

    def read(self, row: int) -> bytes:
        """The encoded image of one row."""
        value = self.images[row][self.column]
        if value is None:
            raise ValueError("the row holds no image")
        data = value["bytes"]
        return bytes(data) if data is not None else Path(value["path"]).read_bytes()


@dataclass(frozen=True)
class _Opener:
    """Opens image i; a class, not a closure, so that a data set can be pickled."""

    parts: tuple[_Part, ...]
    part_N: NDArray[np.int64]
    row_N: NDArray[np.int64]

    def __call__(self, index: int) -> Image.Image:
        part, row = self.parts[self.part_N[index]], int(self.row_N[index])
        try:
            return decode_rgb(part.read(row))
        except (OSError, ValueError) as error:
            raise UserError(
                f"data: split '{part.split}', row {row} was readable and no longer is: {error}."
            ) from None


def load(
    config: DataConfig,
    seed: int,
    cache_dir: Path,
    *,
    classes: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    spell: Callable[[str], str] = readable_name,
) -> ImageDataset:
    """The data set `config.hub_id`.

    `classes` maps the labels' own names to class names, in the order in which labels are then
    numbered; `spell` makes the names readable where it is empty. Rows of the classes in `ignore`
    are left out.

    Raises:
        UserError: unreachable hub, unknown split or column, labels without names, or an
            unreadable image under `on_bad_image: error`.
    """
    splits = _load_splits(config)
    parts = tuple(_parts(splits, config, ignore))
    class_names, labels = _labels(parts, config, classes or {}, ignore, spell)
    domain_names, domains = _domains(parts, config)

    verdicts: list[Verdict] = []
    for part in parts:
        memo = memo_path(cache_dir, "hub", part.images._fingerprint, part.column)
        verdicts += scan(_keys(part), part.read, memo, f"{config.title} ({part.split})")
    where = [(p, row) for p, part in enumerate(parts) for row in range(len(part.labels))]
    names = [f"split '{parts[p].split}', row {row}" for p, row in where]
    bad = bad_images(names, verdicts, config.on_bad_image, config.title)
    kept = np.flatnonzero([verdict.reason is None for verdict in verdicts])

    labels_N = labels[kept]
    split_N = np.array([parts[where[i][0]].code for i in kept], dtype=np.int8)
    if config.test_split is None:
        cells_N = labels_N * len(domain_names) + domains[kept]
        split_N = hold_out_test(cells_N, config.test_fraction, seed)
    used = split_N == (TEST if config.train_split is None else TRAIN)
    what = "test" if config.train_split is None else "training"
    present = np.bincount(labels_N[used], minlength=len(class_names)) > 0
    if present.sum() < 2:
        raise UserError(
            f"data: {config.hub_id} has {what} images of {present.sum()} class(es); at least "
            "two are needed."
        )
    if not present.all():
        log.warning("%s: no %s image of %s", config.title, what, class_names[present.argmin()])
    content = [f"{names[i]}|{verdicts[i].hash}|{labels[i]}" for i in kept]
    return ImageDataset(
        name=config.title,
        class_names=class_names,
        labels_N=labels_N,
        split_N=split_N,
        domains_N=domains[kept],
        domain_names=domain_names,
        fingerprint=digest("hub", *content),
        open_image=_Opener(
            parts,
            np.array([where[i][0] for i in kept], dtype=np.int64),
            np.array([where[i][1] for i in kept], dtype=np.int64),
        ),
        bad_images=bad,
        image_names=tuple(f"{parts[where[i][0]].split}/{where[i][1]}" for i in kept),
    )


def _load_splits(config: DataConfig) -> dict[str, Any]:
    """All splits by name."""
    assert config.hub_id is not None
    folder = Path(config.hub_id).expanduser()
    if not folder.exists() and (
        config.hub_id.startswith(("/", ".", "~")) or config.hub_id.count("/") > 1
    ):
        raise UserError(f"data: no folder {folder}; set data.hub_id to a folder or a hub id.")
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
        else:
            target = str(folder) if folder.is_dir() else config.hub_id
            loaded = datasets.load_dataset(
                target, name=config.hub_config, revision=config.hub_revision
            )
    except Exception as error:  # anything from a broken Parquet file to a name server
        raise UserError(_load_failure(config, folder, error)) from None
    if isinstance(loaded, datasets.Dataset):
        return {config.train_split or config.test_split or "train": loaded}
    return dict(loaded)


def _load_failure(config: DataConfig, folder: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if folder.is_dir():
        return f"data: cannot load the data set in {folder}: {reason}"
    if "BuilderConfig" in reason:
        return f"data: data.hub_config: {reason}"
    return (
        f"data: cannot load '{config.hub_id}' from the hub: {reason.rstrip('.')}. Check the name "
        "(and log in where it is gated); without network, load it on another machine, save it "
        "with save_to_disk, copy the folder and set data.hub_id=/path/to/folder."
    )


def _parts(splits: dict[str, Any], config: DataConfig, ignore: Sequence[str]) -> list[_Part]:
    asked = [("train_split", config.train_split, TRAIN)] if config.train_split is not None else []
    if config.test_split is not None:
        asked.append(("test_split", config.test_split, TEST))
    parts: list[_Part] = []
    for key, value, code in asked:
        for name in (piece.strip() for piece in value.split("+")):
            if name not in splits:
                hint = did_you_mean(name, list(splits))
                raise UserError(
                    f"data: data.{key}: no split '{name}'; there are: {', '.join(splits)}.{hint}"
                )
            if any(part.split == name for part in parts):
                raise UserError(f"data: split '{name}' is used twice; images would leak.")
            parts.append(_part(splits[name], name, code, config, ignore))
    return parts


def _part(
    split: Any, name: str, code: int, config: DataConfig, ignore: Sequence[str] = ()
) -> _Part:
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
    split = _wanted_rows(split, config, ignore)
    try:
        images = split.select_columns([config.image_column]).cast_column(
            config.image_column, datasets.Image(decode=False)
        )
    except (TypeError, ValueError, NotImplementedError):  # Arrow's errors are ValueErrors
        raise UserError(
            f"data: data.image_column: '{config.image_column}' holds "
            f"{split.features[config.image_column]}, not images."
        ) from None
    return _Part(
        split=name,
        code=code,
        images=images,
        column=config.image_column,
        labels=_values(split, config.label_column),
        domains=_names(split, config.domain_column) if config.domain_column else [],
        label_feature=split.features[config.label_column],
    )


def _values(split: Any, column: str) -> list[Any]:
    values: list[Any] = split.select_columns([column]).with_format(None)[:][column]
    return values


def _names(split: Any, column: str) -> list[Any]:
    """The values of a column, as the names that it gives them where it does."""
    values, feature = _values(split, column), split.features[column]
    if not isinstance(feature, datasets.ClassLabel):
        return values
    return [None if value in (None, -1) else feature.names[value] for value in values]


def _wanted_rows(split: Any, config: DataConfig, ignore: Sequence[str]) -> Any:
    """The rows of the domains `data.domains` and of classes that are not ignored."""
    wanted = np.ones(len(split), dtype=bool)
    if ignore:
        ignored = set(map(name_key, ignore))
        labels = _names(split, config.label_column)
        wanted &= np.array([name_key(str(label)) not in ignored for label in labels], dtype=bool)
    if config.domains and config.domain_column is not None:
        values = [str(value) for value in _names(split, config.domain_column)]
        known = sorted(set(values))
        keys = {name_key(value) for value in known}
        for name in config.domains:
            if name_key(name) not in keys:
                raise UserError(
                    f"data: data.domains: no domain '{name}'.{did_you_mean(name, known)}"
                )
        chosen = set(map(name_key, config.domains))
        wanted &= np.array([name_key(value) in chosen for value in values], dtype=bool)
    return split if wanted.all() else split.select(np.flatnonzero(wanted))


def _labels(
    parts: Sequence[_Part],
    config: DataConfig,
    classes: Mapping[str, str],
    ignore: Sequence[str],
    spell: Callable[[str], str],
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """(class names in label order, label of every row)."""
    wanted = config.class_names
    for part in parts:
        for row, value in enumerate(part.labels):
            if value is None or value == -1:
                raise UserError(
                    f"data: split '{part.split}', row {row} has no label; use a labelled split."
                )
    values = [value for part in parts for value in part.labels]
    feature = parts[0].label_feature
    for part in parts[1:]:
        if part.label_feature != feature:
            raise UserError(
                f"data: splits '{parts[0].split}' and '{part.split}' number their classes "
                f"differently in column '{config.label_column}'; relabel one of them."
            )
    if len(set(map(name_key, wanted))) < len(wanted):
        raise UserError("data: data.class_names lists a class twice.")
    if classes and isinstance(feature, datasets.ClassLabel):
        return _matched_labels([str(name) for name in feature.names], values, classes, ignore)
    if classes and all(isinstance(value, str) for value in values):
        found = sorted(set(values))
        return _matched_labels(found, [found.index(v) for v in values], classes, ignore)
    if isinstance(feature, datasets.ClassLabel):
        names = [str(name) for name in feature.names]
        if not wanted and all(name.isdigit() for name in names):
            raise UserError(
                f"data: the labels of '{config.label_column}' are only numbered; give their "
                "names in data.class_names."
            )
        chosen = wanted or [spell(name) for name in names]
        if len(chosen) != len(names):
            raise UserError(
                f"data: data.class_names has {len(chosen)} names, '{config.label_column}' has "
                f"{len(names)} classes: {', '.join(names)}."
            )
        return tuple(chosen), np.array(values, dtype=np.int64)
    if all(isinstance(value, str) for value in values):
        return _string_labels(values, wanted, spell)
    if all(isinstance(value, int) for value in values):
        if not wanted:
            raise UserError(
                f"data: column '{config.label_column}' holds numbers without names; give the "
                "names in data.class_names, in label order."
            )
        low, high = min(values), max(values)
        if low < 0 or high >= len(wanted):
            raise UserError(
                f"data: labels run from {low} to {high}, data.class_names has {len(wanted)} "
                f"names; labels must be 0 to {len(wanted) - 1}."
            )
        return tuple(wanted), np.array(values, dtype=np.int64)
    raise UserError(
        f"data: data.label_column: '{config.label_column}' holds {feature}, not class labels."
    )


def _matched_labels(
    names: Sequence[str], values: Sequence[int], classes: Mapping[str, str], ignore: Sequence[str]
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Class names and labels in the order of `classes`; each of `names` must be among them."""
    by_key = {name_key(ours): label for label, ours in enumerate(classes.values())}
    by_key |= {name_key(theirs): label for label, theirs in enumerate(classes)}
    ignored = set(map(name_key, ignore))
    new = np.full(len(names), -1, dtype=np.int64)
    for old, name in enumerate(names):
        if name_key(name) in by_key:
            new[old] = by_key[name_key(name)]
        elif name_key(name) not in ignored:
            hint = did_you_mean(name, list(classes))
            raise UserError(
                f"data: the hub's class '{name}' is not in the catalogue's list.{hint} Another "
                "data set, or a changed one: compare it with 'fedprompt data show'."
            )
    if len(set(new[new >= 0])) < len(classes):
        absent = min(set(range(len(classes))) - set(new.tolist()))
        raise UserError(f"data: the hub's copy has no class '{list(classes)[absent]}'.")
    return tuple(classes.values()), new[np.array(values, dtype=np.int64)]


def _string_labels(
    values: Sequence[str], wanted: Sequence[str], spell: Callable[[str], str]
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    found = sorted(set(values))
    if not wanted:
        names = tuple(spell(name) for name in found)
        label_of = {name: label for label, name in enumerate(found)}
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise UserError(f"data: several labels are spellings of '{twice[0]}'; merge them.")
        return names, np.array([label_of[value] for value in values], dtype=np.int64)
    by_key = {name_key(name): label for label, name in enumerate(wanted)}
    for name in found:
        if name_key(name) not in by_key:
            hint = did_you_mean(name, list(wanted))
            raise UserError(f"data: label '{name}' is not in data.class_names.{hint}")
    return tuple(wanted), np.array([by_key[name_key(value)] for value in values], dtype=np.int64)


def _domains(
    parts: Sequence[_Part], config: DataConfig
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    if config.domain_column is None:
        rows = sum(len(part.labels) for part in parts)
        return (config.title,), np.zeros(rows, dtype=np.int64)
    values = []
    for part in parts:
        for row, value in enumerate(part.domains):
            if value is None:
                raise UserError(f"data: split '{part.split}', row {row} has no domain.")
            values.append(str(value))
    names = sorted(set(values))
    index = {name: i for i, name in enumerate(names)}
    return tuple(names), np.array([index[value] for value in values], dtype=np.int64)


def _keys(part: _Part) -> list[str]:
    """Row numbers; where rows hold paths instead of bytes, also what tells a changed file."""
    keys: list[str] = []
    for chunk in part.images.with_format("arrow")[:].column(part.column).chunks:
        has_bytes = chunk.field("bytes").is_valid().to_pylist()
        paths = chunk.field("path").to_pylist()
        for inside, path in zip(has_bytes, paths, strict=True):
            row = str(len(keys))
            keys.append(row if inside else f"{row}|{_file_key(path)}")
    return keys


def _file_key(path: str | None) -> str:
    try:
        status = Path(path or "").stat()
    except OSError:
        return "?"
    return f"{path}|{status.st_size}|{status.st_mtime_ns}"
