"""Who holds which image: training images are dealt to clients, then split locally.

Clients share out the TRAIN images only; the TEST images stay with the server. Each client's own
images are split into local train and local test, class by class, so local test follows local
train and never overlaps it. The rules are in `schemes`; a partition file (`partition_file`) takes
their place where one is named, and then says itself what the server tests on.

Every image has one holder, so no image can be in two places. A client may be unlabelled: its
training images are there without their labels. It never trains, nor does a client without
training images, but it is tested like any other; a client without test images is not tested.

Suffixes: N images, T training images, K clients, C classes, D domains, G (client, class) groups.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedprompt.config.schema import PartitionConfig
from fedprompt.data.dataset import TEST, TRAIN, ImageDataset
from fedprompt.data.partition.schemes import Images, Indices, deal
from fedprompt.errors import UserError
from fedprompt.rng import generator

SERVER, NOBODY = -1, -2
"""Holders of an image that are no clients."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Partition:
    """Image indices per client, compact: client k owns `flat[offsets[k]:offsets[k + 1]]`.

    Indices point into the `ImageDataset` the partition was made from, ascending per client.
    `server_test` holds the server's test images. The training images of the clients in
    `unlabelled` have no labels to train on.

    Raises:
        ValueError: an image is held twice.
    """

    train_flat: Indices
    train_offsets: Indices
    test_flat: Indices
    test_offsets: Indices
    server_test: Indices
    unlabelled: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        held = np.concatenate((self.train_flat, self.test_flat, self.server_test))
        if len(np.unique(held)) < len(held):
            raise ValueError("an image is held twice")

    @classmethod
    def of_holders(
        cls,
        holder_N: Indices,
        is_test_N: NDArray[np.bool_],
        clients: int,
        unlabelled: frozenset[int] = frozenset(),
    ) -> Partition:
        """The partition that gives each image to one holder: a client, `SERVER` or `NOBODY`.

        `is_test_N` tells a client's test images from its training images.
        """
        arrays = (
            *_group(holder_N, ~is_test_N, clients),
            *_group(holder_N, is_test_N, clients),
            np.flatnonzero(holder_N == SERVER).astype(np.int64),
        )
        for array in arrays:
            array.flags.writeable = False
        return cls(*arrays, unlabelled=unlabelled)

    @property
    def num_clients(self) -> int:
        """Number of clients K."""
        return len(self.train_offsets) - 1

    @property
    def trainable(self) -> list[int]:
        """Clients with labelled training images, ascending: those that can train."""
        holding = np.flatnonzero(np.diff(self.train_offsets))
        return [int(k) for k in holding if int(k) not in self.unlabelled]

    def train(self, client: int) -> Indices:
        """Images that client trains on."""
        return self.train_flat[self.train_offsets[client] : self.train_offsets[client + 1]]

    def test(self, client: int) -> Indices:
        """Images that client tests on, disjoint from its training images; may be empty."""
        return self.test_flat[self.test_offsets[client] : self.test_offsets[client + 1]]

    def train_counts(self, labels_N: NDArray[np.int64], num_classes: int) -> Indices:
        """Local training images per client and class, (K, C)."""
        return _counts(self.train_flat, self.train_offsets, labels_N, num_classes)

    def test_counts(self, labels_N: NDArray[np.int64], num_classes: int) -> Indices:
        """Local test images per client and class, (K, C)."""
        return _counts(self.test_flat, self.test_offsets, labels_N, num_classes)


def make_partition(dataset: ImageDataset, config: PartitionConfig, seed: int) -> Partition:
    """The partition that `config` and `seed` describe; the same on every machine.

    Raises:
        UserError: the scheme cannot be met with these images, or the partition file does not fit
            them; the message has the numbers.
    """
    if dataset.owners_N is not None:
        return _as_owned(dataset, dataset.owners_N, config, seed)
    if config.file is None:
        partition = _deal(dataset, config, seed)
    else:
        from fedprompt.data.partition.file import read_partition  # it needs `Partition`

        partition = read_partition(Path(config.file).expanduser(), dataset, config.clients)
    idle = sorted(set(range(partition.num_clients)) - set(partition.trainable))
    if len(idle) == partition.num_clients:
        raise UserError("partition: no client has labelled training images.")
    if idle:
        shown = ", ".join(map(str, idle[:10])) + (", ..." if len(idle) > 10 else "")
        log.warning(
            "partition: %d of %d clients have no labelled training images and never train: %s",
            len(idle),
            partition.num_clients,
            shown,
        )
    return partition


def _deal(dataset: ImageDataset, config: PartitionConfig, seed: int) -> Partition:
    train_T = np.flatnonzero(dataset.split_N == TRAIN).astype(np.int64)
    labels_T = dataset.labels_N[train_T]
    _check_enough(len(train_T), config)
    order_T = generator(seed, "partition", "order").permutation(len(train_T))
    images = Images(
        labels_T[order_T],
        dataset.domains_N[train_T][order_T],
        dataset.class_names,
        dataset.domain_names,
        dataset.superclass_names,
    )
    owner_T = np.empty(len(train_T), dtype=np.int64)
    owner_T[order_T] = deal(images, config, seed)
    sizes_K = np.bincount(owner_T, minlength=config.clients)
    if sizes_K.min() < config.min_images:
        client = int(sizes_K.argmin())
        raise UserError(
            f"partition: scheme '{config.scheme}' leaves client {client} {sizes_K[client]} of "
            f"{len(train_T)} training images, partition.min_images asks for {config.min_images}; "
            f"lower it or partition.clients ({config.clients})."
        )
    rng = generator(seed, "partition", "local-split")
    train_mask, test_mask = _split_locally(owner_T, labels_T, config, rng)
    holder_N = np.where(dataset.split_N == TEST, SERVER, NOBODY).astype(np.int64)
    holder_N[train_T] = np.where(train_mask | test_mask, owner_T, NOBODY)
    is_test_N = np.zeros(len(dataset), dtype=bool)
    is_test_N[train_T] = test_mask
    return Partition.of_holders(holder_N, is_test_N, config.clients, _unlabelled(config, seed))


def _as_owned(
    dataset: ImageDataset, owners_N: Indices, config: PartitionConfig, seed: int
) -> Partition:
    """The data say who holds what; each client's images are split by themselves.

    A client's split is thus the same on a node that has no other client's images. Clients without
    images here are elsewhere.
    """
    holder_N = np.where(dataset.split_N == TEST, SERVER, NOBODY).astype(np.int64)
    is_test_N = np.zeros(len(dataset), dtype=bool)
    for client in range(config.clients):
        own = np.flatnonzero((owners_N == client) & (dataset.split_N == TRAIN))
        if 0 < len(own) < config.min_images:
            raise UserError(
                f"partition: client {client} holds {len(own)} images, partition.min_images asks "
                f"for {config.min_images}."
            )
        if len(own):
            rng = generator(seed, "partition", "local-split", client)
            train, test = _split_locally(owners_N[own], dataset.labels_N[own], config, rng)
            holder_N[own] = np.where(train | test, client, NOBODY)
            is_test_N[own] = test
    return Partition.of_holders(holder_N, is_test_N, config.clients, _unlabelled(config, seed))


def _unlabelled(config: PartitionConfig, seed: int) -> frozenset[int]:
    draw = generator(seed, "partition", "unlabelled").permutation(config.clients)
    return frozenset(int(k) for k in draw[: config.unlabelled_clients])


def describe(dataset: ImageDataset, partition: Partition) -> dict[str, Any]:
    """The partition as counts, ready for JSON: what a run folder's `partition.json` holds.

    `train_counts` and `test_counts` have a row per client, of classes and their counts in turn:
    `[3, 12, 7, 1]` = 12 images of class 3 and 1 of class 7; `dense` makes a K x C array of them.
    `domain_counts` likewise, over a client's local train and test images together;
    `server_test_counts` has one number per class. The labels that `unlabelled_clients` cannot
    train on are counted with the others.
    """
    num_classes, num_domains = len(dataset.class_names), len(dataset.domain_names)
    domain_KD = _counts(
        partition.train_flat, partition.train_offsets, dataset.domains_N, num_domains
    ) + _counts(partition.test_flat, partition.test_offsets, dataset.domains_N, num_domains)
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
    """One row per client: columns with a count and that count, in turn."""
    client_G, column_G = np.nonzero(counts_KC)
    pairs_G2 = np.stack((column_G, counts_KC[client_G, column_G]), axis=1)
    ends = np.cumsum(np.bincount(client_G, minlength=len(counts_KC))[:-1])
    return [pairs.ravel().tolist() for pairs in np.split(pairs_G2, ends)]


def dense(rows: Sequence[Sequence[int]], width: int) -> Indices:
    """Counts (K, width) from the rows that `sparse` gives.

    Raises:
        ValueError: these are not such rows, or have columns beyond `width`.
    """
    lengths_K = np.array([len(row) for row in rows], dtype=np.int64)
    flat = np.array(list(chain.from_iterable(rows)), dtype=np.int64)
    column_G, count_G = flat[0::2], flat[1::2]
    if (lengths_K % 2).any() or (len(flat) and not 0 <= column_G.min() <= column_G.max() < width):
        raise ValueError(f"rows are not pairs of a column below {width} and a count")
    counts_KC = np.zeros((len(rows), width), dtype=np.int64)
    counts_KC[np.repeat(np.arange(len(rows)), lengths_K // 2), column_G] = count_G
    return counts_KC


def _check_enough(images: int, config: PartitionConfig) -> None:
    if config.clients > images:
        raise UserError(
            f"partition: {config.clients} clients cannot share {images} training images; "
            "lower partition.clients."
        )
    if config.clients * config.min_images > images:
        raise UserError(
            f"partition: {config.clients} clients with at least {config.min_images} images each "
            f"need {config.clients * config.min_images} training images, there are {images}; "
            "lower partition.clients or partition.min_images."
        )


def _split_locally(
    owner_T: Indices, labels_T: Indices, config: PartitionConfig, rng: np.random.Generator
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Masks of local train and local test images.

    A class of m local images gives floor(f m) of them to test; the client's rounded share f n is
    then made up from the classes with the largest remainders, one image each (ties at random). A
    class always keeps one image in train, so classes of one image are never tested locally.
    """
    num_labels, fraction = int(labels_T.max()) + 1, config.local_test_fraction
    key_T = owner_T * num_labels + labels_T
    by_group_T = np.lexsort((rng.permutation(len(key_T)), key_T))
    key_G, start_G, size_G = np.unique(key_T[by_group_T], return_index=True, return_counts=True)
    client_G = key_G // num_labels
    test_G = np.minimum(np.floor(fraction * size_G).astype(np.int64), size_G - 1)
    held_K = np.bincount(owner_T, minlength=config.clients)
    given_K = np.bincount(client_G, test_G, minlength=config.clients)
    missing_K = np.floor(fraction * held_K + 0.5) - given_K
    # Rounded, so that float noise does not decide between equal remainders.
    remainder_G = np.round(fraction * size_G - test_G, 9)
    ranked_G = np.lexsort((rng.random(len(key_G)), -remainder_G, client_G))
    has_room_G = (remainder_G > 0) & (size_G - 1 > test_G)
    ranked_G = ranked_G[has_room_G[ranked_G]]
    first_G = np.searchsorted(client_G[ranked_G], client_G[ranked_G])
    rank_G = np.arange(len(ranked_G)) - first_G
    test_G[ranked_G[rank_G < missing_K[client_G[ranked_G]]]] += 1

    rank_T = np.arange(len(key_T)) - np.repeat(start_G, size_G)
    tests_T = np.repeat(test_G, size_G)
    shots = config.shots if config.shots is not None else len(key_T)
    train_mask, test_mask = np.zeros((2, len(key_T)), dtype=bool)
    test_mask[by_group_T] = rank_T < tests_T
    train_mask[by_group_T] = (rank_T >= tests_T) & (rank_T < tests_T + shots)
    return train_mask, test_mask


def _group(holder_N: Indices, mask_N: NDArray[np.bool_], clients: int) -> tuple[Indices, Indices]:
    """(flat, offsets) of the images in the mask that clients hold."""
    chosen = np.flatnonzero(mask_N & (holder_N >= 0)).astype(np.int64)
    chosen = chosen[np.argsort(holder_N[chosen], kind="stable")]
    sizes_K = np.bincount(holder_N[chosen], minlength=clients)
    return chosen, np.concatenate(([0], np.cumsum(sizes_K))).astype(np.int64)


def _counts(flat: Indices, offsets: Indices, values_N: Indices, num_values: int) -> Indices:
    clients = len(offsets) - 1
    client = np.repeat(np.arange(clients), np.diff(offsets))
    cells = np.bincount(client * num_values + values_N[flat], minlength=clients * num_values)
    return cells.reshape(clients, num_values).astype(np.int64)
