"""Divides the training images among the clients and splits each client's images locally.

Every process calls `make_partition` once, before the first round. Here is what all schemes have in
common: the seeded order of the images, the check of client sizes and the local train-test split.

Suffixes: N images, T training images, K clients, G (client, class) groups.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedprompt.config.schema import PartitionConfig
from fedprompt.data.dataset import TEST, TRAIN, ImageDataset
from fedprompt.data.partition.draws import Indices
from fedprompt.data.partition.file import read_partition
from fedprompt.data.partition.holders import NOBODY, SERVER, Partition
from fedprompt.data.partition.schemes import Images, deal
from fedprompt.errors import UserError
from fedprompt.rng import generator

log = logging.getLogger(__name__)


def make_partition(dataset: ImageDataset, config: PartitionConfig, seed: int) -> Partition:
    """Divide the images of a data set among the clients. The result is the same on every machine.

    Args:
        dataset: the images. If the data set itself specifies the owner of each image, neither the
            scheme nor a partition file is used.
        config: the config's `partition` section.
        seed: seed of the experiment.

    Returns:
        The partition: local train and local test images of each client, test images of the server.

    Raises:
        UserError: the scheme is impossible with these images, or the partition file does not match
            them. The message contains the numbers.
    """
    if dataset.owners_N is not None:
        return _as_owned(dataset, dataset.owners_N, config, seed)
    if config.file is None:
        partition = _deal(dataset, config, seed)
    else:
        partition = read_partition(Path(config.file).expanduser(), dataset, config.clients)
    # A data set with owners was returned above: on a node, most clients have no images because
    # other nodes hold them, so a warning about idle clients would be wrong there.
    idle = sorted(set(range(partition.num_clients)) - set(partition.trainable))
    if len(idle) == partition.num_clients:
        raise UserError("partition: no client has labelled training images.")
    if idle:
        first = ", ".join(map(str, idle[:10])) + (", ..." if len(idle) > 10 else "")
        log.warning(
            "partition: %d of %d clients have no labelled training images and never train: %s",
            len(idle),
            partition.num_clients,
            first,
        )
    return partition


def _deal(dataset: ImageDataset, config: PartitionConfig, seed: int) -> Partition:
    train_T = np.flatnonzero(dataset.split_N == TRAIN).astype(np.int64)
    labels_T = dataset.labels_N[train_T]
    _check_enough(len(train_T), config)
    # Data sets list their images class by class. Schemes cut runs of consecutive images, so they
    # must see the images in a random order.
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
    # Images that a protocol holds out are neither TRAIN nor TEST; nobody holds them.
    holder_N = np.where(dataset.split_N == TEST, SERVER, NOBODY).astype(np.int64)
    # With `shots`, images in excess are in neither mask and belong to nobody.
    holder_N[train_T] = np.where(train_mask | test_mask, owner_T, NOBODY)
    is_test_N = np.zeros(len(dataset), dtype=bool)
    is_test_N[train_T] = test_mask
    return Partition.of_holders(holder_N, is_test_N, config.clients, _unlabelled(config, seed))


def _as_owned(
    dataset: ImageDataset, owners_N: Indices, config: PartitionConfig, seed: int
) -> Partition:
    """Return the partition of a data set that itself specifies the owner of each image.

    Each client's images are split with a generator of their own, so that the split is the same on a
    node that holds no other client's images. Clients without images here hold them elsewhere.
    """
    holder_N = np.where(dataset.split_N == TEST, SERVER, NOBODY).astype(np.int64)
    is_test_N = np.zeros(len(dataset), dtype=bool)
    for client in range(config.clients):
        held = np.flatnonzero((owners_N == client) & (dataset.split_N == TRAIN))
        # An empty client is allowed, because its images may be on another machine.
        if 0 < len(held) < config.min_images:
            raise UserError(
                f"partition: client {client} holds {len(held)} images, partition.min_images asks "
                f"for {config.min_images}."
            )
        if len(held):
            rng = generator(seed, "partition", "local-split", client)
            train, test = _split_locally(owners_N[held], dataset.labels_N[held], config, rng)
            holder_N[held] = np.where(train | test, client, NOBODY)
            is_test_N[held] = test
    return Partition.of_holders(holder_N, is_test_N, config.clients, _unlabelled(config, seed))


def _unlabelled(config: PartitionConfig, seed: int) -> frozenset[int]:
    # The head of one permutation: a larger `unlabelled_clients` only adds clients to the set.
    draw = generator(seed, "partition", "unlabelled").permutation(config.clients)
    return frozenset(int(k) for k in draw[: config.unlabelled_clients])


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
    """Split the images of every client into local train and local test, class by class.

    With f = `local_test_fraction`, floor(f m) of a class's m local images become test images. The
    client should have round(f n) test images of its n images; the missing ones come from the
    classes with the largest remainders, one image each (ties at random). At least one image of
    every class stays in train, so classes with a single image are never tested locally.

    Args:
        owner_T: client of each image.
        labels_T: class of each image.
        config: the local test fraction, and `shots`, the largest number of training images per
            client and class.
        rng: decides which images of a class become test images, and between equal remainders.

    Returns:
        Masks (T,) of the local train and the local test images. They are disjoint; with `shots`,
        some images are in neither.
    """
    # One sort groups the images by client and class, so the cost hardly depends on their numbers.
    num_labels, fraction = int(labels_T.max()) + 1, config.local_test_fraction
    key_T = owner_T * num_labels + labels_T
    # The last key of lexsort is the primary one: groups in order, images shuffled within a group.
    by_group_T = np.lexsort((rng.permutation(len(key_T)), key_T))
    key_G, start_G, size_G = np.unique(key_T[by_group_T], return_index=True, return_counts=True)
    client_G = key_G // num_labels
    test_G = np.minimum(np.floor(fraction * size_G).astype(np.int64), size_G - 1)
    held_K = np.bincount(owner_T, minlength=config.clients)
    given_K = np.bincount(client_G, test_G, minlength=config.clients)
    # Rounds half up; np.round would round half to even.
    missing_K = np.floor(fraction * held_K + 0.5) - given_K
    # Rounded, so that float noise does not decide between equal remainders.
    remainder_G = np.round(fraction * size_G - test_G, 9)
    ranked_G = np.lexsort((rng.random(len(key_G)), -remainder_G, client_G))
    has_room_G = (remainder_G > 0) & (size_G - 1 > test_G)
    ranked_G = ranked_G[has_room_G[ranked_G]]
    # Rank within the client: position among all ranked groups minus that of the client's first.
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
