"""A partition as counts of images, for `partition.json` in run folders and for figures.

Suffixes: K clients, C classes, D domains, G (client, column) pairs with a count.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from fedprompt.data.dataset import VAL, ImageDataset
from fedprompt.data.partition.draws import Indices
from fedprompt.data.partition.holders import Partition, count_values


def describe(dataset: ImageDataset, partition: Partition) -> dict[str, Any]:
    """Summarise a partition as counts, ready for JSON: a run folder's `partition.json`.

    Args:
        dataset: the data set that was partitioned.
        partition: its partition.

    Returns:
        Names of classes and domains, and counts of images. `train_counts` and `test_counts` have
        one row per client in which class numbers and counts alternate: `[3, 12, 7, 1]` means 12
        images of class 3 and 1 image of class 7. `dense` turns the rows into an array (K, C).
        `domain_counts` has the same form and counts local train and test images together. If there
        are validation images, `validation_counts` and `server_validation_counts` count them, and
        `official_validation_images` says how many of the server's are of the data set's own split.
        `server_test_counts` has one number per class. Images of `unlabelled_clients` are counted
        like all others.
    """
    num_classes, num_domains = len(dataset.class_names), len(dataset.domain_names)
    domain_KD = count_values(
        partition.train_flat, partition.train_offsets, dataset.domains_N, num_domains
    ) + count_values(partition.test_flat, partition.test_offsets, dataset.domains_N, num_domains)
    server_C = np.bincount(dataset.labels_N[partition.server_test], minlength=num_classes)
    counts = {
        "class_names": list(dataset.class_names),
        "domain_names": list(dataset.domain_names),
        "train_counts": sparse(partition.train_counts(dataset.labels_N, num_classes)),
        "test_counts": sparse(partition.test_counts(dataset.labels_N, num_classes)),
        "domain_counts": sparse(domain_KD),
        "server_test_counts": server_C.tolist(),
        "unlabelled_clients": sorted(partition.unlabelled),
    }
    if partition.has_validation:
        validation_KC = partition.validation_counts(dataset.labels_N, num_classes)
        server_C = np.bincount(dataset.labels_N[partition.server_validation], minlength=num_classes)
        counts |= {
            "validation_counts": sparse(validation_KC),
            "server_validation_counts": server_C.tolist(),
        }
        official = dataset.split_N[partition.server_validation] == VAL
        if official.any():
            counts["official_validation_images"] = int(official.sum())
    return counts


def sparse(counts_KC: Indices) -> list[list[int]]:
    """Turn counts (K, columns) into one list per client: `[column, count, column, count, ...]`.

    Columns without images are omitted.
    """
    # A client usually holds few of the classes: with 1,000 clients and 1,000 classes, a dense table
    # would make `partition.json` megabytes large.
    client_G, column_G = np.nonzero(counts_KC)
    pairs_G2 = np.stack((column_G, counts_KC[client_G, column_G]), axis=1)
    ends = np.cumsum(np.bincount(client_G, minlength=len(counts_KC))[:-1])
    return [pairs.ravel().tolist() for pairs in np.split(pairs_G2, ends)]


def dense(rows: Sequence[Sequence[int]], width: int) -> Indices:
    """Turn rows as `sparse` returns them back into counts (K, width).

    Raises:
        ValueError: the rows do not have that form, or contain a column of `width` or above.
    """
    lengths_K = np.array([len(row) for row in rows], dtype=np.int64)
    flat = np.array(list(chain.from_iterable(rows)), dtype=np.int64)
    column_G, count_G = flat[0::2], flat[1::2]
    if (lengths_K % 2).any() or (len(flat) and not 0 <= column_G.min() <= column_G.max() < width):
        raise ValueError(f"rows are not pairs of a column below {width} and a count")
    counts_KC = np.zeros((len(rows), width), dtype=np.int64)
    counts_KC[np.repeat(np.arange(len(rows)), lengths_K // 2), column_G] = count_G
    return counts_KC
