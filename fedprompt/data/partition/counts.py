"""A partition as counts, for run folders and figures.

Suffixes: K clients, C classes, D domains, G (client, column) pairs with a count.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from fedprompt.data.dataset import ImageDataset
from fedprompt.data.partition.draws import Indices
from fedprompt.data.partition.holders import Partition, count_values


def describe(dataset: ImageDataset, partition: Partition) -> dict[str, Any]:
    """The partition as counts, ready for JSON: the content of a run folder's `partition.json`.

    Args:
        dataset: the data set that was partitioned.
        partition: its partition.

    Returns:
        Names of classes and domains, and counts. `train_counts` and `test_counts` have a row per
        client, of classes and their counts in turn: `[3, 12, 7, 1]` stands for 12 images of class
        3 and 1 of class 7; `dense` makes an array (K, C) of them. `domain_counts` has the same
        form, over a client's local train and test images. `server_test_counts` has one number per
        class. Images of `unlabelled_clients` are counted like all others.
    """
    num_classes, num_domains = len(dataset.class_names), len(dataset.domain_names)
    domain_KD = count_values(
        partition.train_flat, partition.train_offsets, dataset.domains_N, num_domains
    ) + count_values(partition.test_flat, partition.test_offsets, dataset.domains_N, num_domains)
    server_C = np.bincount(dataset.labels_N[partition.server_test], minlength=num_classes)
    return {
        "class_names": list(dataset.class_names),
        "domain_names": list(dataset.domain_names),
        "train_counts": sparse(partition.train_counts(dataset.labels_N, num_classes)),
        "test_counts": sparse(partition.test_counts(dataset.labels_N, num_classes)),
        "domain_counts": sparse(domain_KD),
        "server_test_counts": server_C.tolist(),
        "unlabelled_clients": sorted(partition.unlabelled),
    }


def sparse(counts_KC: Indices) -> list[list[int]]:
    """Counts (K, columns) as one row per client: non-zero columns and their counts in turn."""
    client_G, column_G = np.nonzero(counts_KC)
    pairs_G2 = np.stack((column_G, counts_KC[client_G, column_G]), axis=1)
    ends = np.cumsum(np.bincount(client_G, minlength=len(counts_KC))[:-1])
    return [pairs.ravel().tolist() for pairs in np.split(pairs_G2, ends)]


def dense(rows: Sequence[Sequence[int]], width: int) -> Indices:
    """Counts (K, width) from rows as `sparse` returns them.

    Raises:
        ValueError: the rows do not have that form, or name columns beyond `width`.
    """
    lengths_K = np.array([len(row) for row in rows], dtype=np.int64)
    flat = np.array(list(chain.from_iterable(rows)), dtype=np.int64)
    column_G, count_G = flat[0::2], flat[1::2]
    if (lengths_K % 2).any() or (len(flat) and not 0 <= column_G.min() <= column_G.max() < width):
        raise ValueError(f"rows are not pairs of a column below {width} and a count")
    counts_KC = np.zeros((len(rows), width), dtype=np.int64)
    counts_KC[np.repeat(np.arange(len(rows)), lengths_K // 2), column_G] = count_G
    return counts_KC
