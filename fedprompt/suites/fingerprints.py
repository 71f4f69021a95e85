"""Fingerprints of data sets and partitions: what two results must share to be compared.

Suffix: N images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedprompt.config.schema import Config
from fedprompt.data.cache_files import default_cache_dir
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.held_out import HeldOut
from fedprompt.data.partition import Partition
from fedprompt.data.partition.file import fingerprint
from fedprompt.errors import UserError
from fedprompt.experiment.compose import compose
from fedprompt.experiment.workspaces import ResourceCache, deal
from fedprompt.suites.spec import Scenario, Suite


@dataclass(frozen=True)
class Fingerprints:
    """What a scenario's runs are computed on.

    Attributes:
        data: The fingerprint of the data set.
        partitions: The fingerprints of the partitions by seed.
    """

    data: str
    partitions: Mapping[int, str]


def data_fingerprint(dataset: ImageDataset) -> str:
    """SHA-256 that changes with any name, label or pixel of a data set.

    Args:
        dataset: The whole data set. Its own fingerprint covers pixels and order, and that of
            partition files names and labels.
    """
    content = f"{fingerprint(dataset)} {dataset.fingerprint}".encode()
    if dataset.targets_NC is not None:
        content += dataset.targets_NC.tobytes()
    return hashlib.sha256(content).hexdigest()


def partition_fingerprint(
    dataset: ImageDataset, partition: Partition, held_out: HeldOut | None = None
) -> str:
    """SHA-256 of which images everyone holds, by name: per client and part, and the server's.

    Args:
        dataset: The data set that was partitioned.
        partition: The partition.
        held_out: The images that a protocol tests on and nobody holds.
    """

    def names(index_N: Any) -> list[str]:
        return sorted(dataset.image_names[int(i)] for i in index_N)

    content = {
        "clients": [
            [names(part(k)) for part in (partition.train, partition.validation, partition.test)]
            for k in range(partition.num_clients)
        ],
        "unlabelled": sorted(partition.unlabelled),
        "server": [names(partition.server_validation), names(partition.server_test)],
        "held out": names(held_out.index_N) if held_out else [],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def take(suite: Suite, scenario: Scenario, config: Config, cache: ResourceCache) -> Fingerprints:
    """Open the data of a scenario and take the fingerprints.

    Args:
        suite: The suite, for its seeds.
        scenario: One of its scenarios.
        config: The scenario's config, with the folder of the images on this machine.
        cache: Keeps data sets open that scenarios share.

    Raises:
        UserError: The data cannot be opened or partitioned, or are not those that the suite names.
    """
    folder = default_cache_dir(config.output.cache)
    data: dict[str, None] = {}
    partitions = {}
    for seed in suite.seeds:
        try:
            dataset = cache.dataset(config.data, seed, folder)
        except UserError as error:
            raise UserError(
                f"suite: {suite.name}: scenario '{scenario.name}': {error} With --data DIR, it is "
                f"expected in DIR/{config.data.title}."
            ) from None
        try:
            view, held_out, partition = deal(compose(config, [f"seed={seed}"]), dataset)
            data[data_fingerprint(dataset)] = None
            partitions[seed] = partition_fingerprint(view, partition, held_out)
        except UserError as error:
            raise UserError(f"suite: {suite.name}: scenario '{scenario.name}': {error}") from None
    # Usually the images are the same for all seeds, and only their split differs.
    (found, *others) = data
    if others:
        found = hashlib.sha256(" ".join(data).encode()).hexdigest()
    fingerprints = Fingerprints(found, partitions)
    _compare(suite, scenario, fingerprints)
    return fingerprints


def _compare(suite: Suite, scenario: Scenario, found: Fingerprints) -> None:
    """Refuse data and partitions that are not the pinned ones."""
    wrong = "the images" if scenario.data not in (None, found.data) else ""
    pinned = scenario.partitions or {}
    for seed, value in found.partitions.items():
        if not wrong and pinned and pinned.get(seed) != value:
            wrong = f"the partition of seed {seed}"
    if wrong:
        raise UserError(
            f"suite: {suite.name}: scenario '{scenario.name}': {wrong} differ from the suite's "
            "fingerprint, so results would not be comparable. A change of drawing, splitting or "
            "partitioning needs a new version of the suite."
        )
