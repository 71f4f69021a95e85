"""Training images are dealt to clients by a scheme or a file, then split into local train and test.

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
    """Deal the images of a data set to clients; the result is the same on every machine.

    Args:
        dataset: the images. If the data set says who owns each image, the scheme is not used.
        config: the scheme, or a partition file, and the number of clients.
        seed: seed of the experiment.

    Returns:
        The partition of the training images among the clients, each with its local test images,
        and of the test images to the server.

    Raises:
        UserError: the scheme is not possible with these images, or the partition file does not fit
            them. The message has the numbers.
    """
    if dataset.owners_N is not None:
        return _as_owned(dataset, dataset.owners_N, config, seed)
    if config.file is None:
        partition = _deal(dataset, config, seed)
    else:
        partition = read_partition(Path(config.file).expanduser(), dataset, config.clients)
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
    """The partition of a data set that says itself who owns each image.

    Each client's images are split separately, so that the split is the same on a node that has no
    other client's images. Clients without images here have them on other machines.
    """
    holder_N = np.where(dataset.split_N == TEST, SERVER, NOBODY).astype(np.int64)
    is_test_N = np.zeros(len(dataset), dtype=bool)
    for client in range(config.clients):
        held = np.flatnonzero((owners_N == client) & (dataset.split_N == TRAIN))
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
