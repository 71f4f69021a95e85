"""Partition files: which client holds which image, as JSON that other systems can read and write.

`fedprompt data partition` writes them, and every process of a run with `partition.file` reads one.
docs/partition_file.md describes the format. Images are identified by name and not by number, so a
file does not depend on the order in which a data set lists its images. A fingerprint of names and
labels ties the file to its data. Suffix: N images.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt.config.schema import PartitionConfig
from fedprompt.data.dataset import HELD, TEST, TRAIN, VAL, ImageDataset
from fedprompt.data.partition.holders import NOBODY, SERVER, Partition
from fedprompt.errors import UserError
from fedprompt.files import refuse_foreign, write_bytes

log = logging.getLogger(__name__)

FORMAT, VERSION = "fedprompt partition", 1
KEYS = {"format", "version", "dataset", "origin", "server_test", "clients"}
SERVER_VALIDATION = "server_validation"
"""An optional key of a file."""
PARTS = {"train": TRAIN, "validation": VAL, "test": TEST}
"""The lists of a client, and what they say of an image; `validation` is optional."""


def fingerprint(dataset: ImageDataset) -> str:
    """Return the SHA-256 of the lines `label<TAB>image name<LF>`, sorted by name as UTF-8 bytes.

    It does not depend on the location of the images, on their order, or on the train-test split.
    The label of an image that a protocol holds out is -1.

    Raises:
        UserError: the data set does not name its images.
    """
    names = _names(dataset)
    hashed = hashlib.sha256()
    for name, label in sorted(zip(map(_bytes, names), dataset.labels_N.tolist(), strict=True)):
        hashed.update(b"%d\t%s\n" % (label, name))
    return hashed.hexdigest()


def write_partition(
    path: Path, dataset: ImageDataset, partition: Partition, origin: Mapping[str, Any]
) -> None:
    """Write the partition of `dataset` to a partition file.

    Args:
        path: the file to create or replace.
        dataset: the data set that was partitioned; its images must have names.
        partition: the partition.
        origin: how the partition was made, for human readers; see `origin_of`.

    Raises:
        UserError: the file cannot be written or is not a partition file, or the images have no
            names.
    """
    refuse_foreign(path, f'"format": "{FORMAT}"'.encode())
    names = _names(dataset)

    def named(index: Any) -> list[str]:
        return [names[int(i)] for i in index]

    clients = []
    for k in range(partition.num_clients):
        client: dict[str, Any] = {} if k not in partition.unlabelled else {"labelled": False}
        client["train"] = named(partition.train(k))
        if len(partition.validation(k)):
            client["validation"] = named(partition.validation(k))
        client["test"] = named(partition.test(k))
        clients.append(client)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "dataset": {
            "name": dataset.name,
            "images": len(dataset),
            "classes": len(dataset.class_names),
            "fingerprint": fingerprint(dataset),
        },
        "origin": dict(origin),
        "server_test": named(partition.server_test),
        "clients": clients,
    }
    # Left out if there are none, so that older versions can read files without validation images.
    if len(partition.server_validation):
        content[SERVER_VALIDATION] = named(partition.server_validation)
    try:
        write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from None


def origin_of(config: PartitionConfig, seed: int) -> dict[str, Any]:
    """Describe how a partition was made, for human readers: seed and `partition` section."""
    return {"seed": seed, "partition": dataclasses.asdict(config)}


def read_partition(path: Path, dataset: ImageDataset, clients: int) -> Partition:
    """Read a partition file and check it against the data set and the number of clients.

    Args:
        path: the partition file.
        dataset: the data set that the file must have been written for.
        clients: number of clients that the file must contain, `partition.clients`.

    Returns:
        The partition, with indices into `dataset`.

    Raises:
        UserError: the file does not exist, has another format, belongs to other data, contains
            another number of clients, or names an image that is unknown, held out by a protocol or
            named twice.
    """
    stored = _load(path)
    _check_data(path, stored, dataset)
    rows = stored["clients"]
    if len(rows) != clients:
        raise UserError(
            f"partition: {path} is for {len(rows)} clients; set partition.clients={len(rows)} "
            f"(it is {clients})."
        )
    number = {name: i for i, name in enumerate(_names(dataset))}
    holder_N = np.full(len(dataset), NOBODY, dtype=np.int64)
    part_N = np.full(len(dataset), TEST, dtype=np.int8)
    lists = [
        ("server_test", SERVER, TEST, stored["server_test"]),
        (SERVER_VALIDATION, SERVER, VAL, stored.get(SERVER_VALIDATION, [])),
    ]
    for k, row in enumerate(rows):
        lists += [(f"clients[{k}].{name}", k, PARTS[name], row.get(name, [])) for name in PARTS]
    place: dict[int, str] = {}
    for where, holder, part, names in lists:
        for name in names:
            i = number.get(name)
            if i is None:
                raise UserError(f"partition: {path}: {where}: no image '{name}' in {dataset.name}.")
            if dataset.split_N[i] == HELD:
                raise UserError(f"partition: {path}: {where}: '{name}' is held out by a protocol.")
            if i in place:
                raise UserError(
                    f"partition: {path}: image '{name}' is in {place[i]} and in {where}; every "
                    "image may be named once."
                )
            place[i], holder_N[i], part_N[i] = where, holder, part
    # A warning and no error: some papers pool all images and split them among the clients.
    taken = int(((holder_N >= 0) & (part_N == TRAIN) & (dataset.split_N == TEST)).sum())
    if taken:
        log.warning(
            "partition: %s trains on %d of the %d images that %s keeps for tests",
            path,
            taken,
            (dataset.split_N == TEST).sum(),
            dataset.name,
        )
    unlabelled = frozenset(k for k, row in enumerate(rows) if not row.get("labelled", True))
    return Partition.of_holders(holder_N, part_N, clients, unlabelled)


def _names(dataset: ImageDataset) -> tuple[str, ...]:
    if len(dataset.image_names) != len(dataset):
        raise UserError(f"partition: the images of {dataset.name} have no names for a file.")
    return dataset.image_names


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")  # file names need not be valid UTF-8


def _load(path: Path) -> dict[str, Any]:
    """Read a file and return its content; all required keys are present and of the right type."""
    try:
        stored = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"partition: cannot read {path}: {error.strerror}.") from None
    # json raises RecursionError for deeply nested input, which a file from elsewhere may contain.
    except (ValueError, RecursionError) as error:
        raise UserError(f"partition: {path} is not JSON: {error}.") from None
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise UserError(f"partition: {path} is no partition file: it lacks 'format': '{FORMAT}'.")
    if stored.get("version") != VERSION:
        raise UserError(
            f"partition: {path} has version {stored.get('version')!r}; this is for {VERSION}."
        )
    problem = _problem(stored)
    if problem:
        raise UserError(f"partition: {path}: {problem}; see docs/partition_file.md.")
    return stored


def _problem(stored: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the keys and types of a file's content, or None."""
    unknown = sorted(set(stored) - KEYS - {SERVER_VALIDATION})
    if unknown:
        return f"unknown key '{unknown[0]}'"
    if not isinstance(stored.get("dataset"), dict) or "fingerprint" not in stored["dataset"]:
        return "'dataset' must hold a 'fingerprint'"
    for name in ("server_test", SERVER_VALIDATION):
        if not _is_names(stored.get(name, [] if name == SERVER_VALIDATION else None)):
            return f"'{name}' must be a list of image names"
    rows = stored.get("clients")
    if not isinstance(rows, list) or not rows:
        return "'clients' must be a list with an object for each client"
    for k, row in enumerate(rows):
        if not isinstance(row, dict) or not {"train", "test"} <= set(row) <= {*PARTS, "labelled"}:
            return (
                f"clients[{k}] must hold 'train' and 'test', and beside them only 'validation' and "
                "'labelled'"
            )
        for name in PARTS:
            if not _is_names(row.get(name, [])):
                return f"clients[{k}]: '{name}' must be a list of image names"
        if not isinstance(row.get("labelled", True), bool):
            return f"clients[{k}]: 'labelled' must be true or false"
    return None


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _check_data(path: Path, stored: Mapping[str, Any], dataset: ImageDataset) -> None:
    found = stored["dataset"]
    if found["fingerprint"] == fingerprint(dataset):
        return
    of = f"{found.get('name', 'another data set')} ({found.get('images', '?')} images)"
    raise UserError(
        f"partition: {path} was made for {of}; names or labels of the {len(dataset)} images of "
        f"{dataset.name} differ from its. Write one for this experiment with 'fedprompt data "
        "partition'."
    )
