"""Divides the training images among the clients and splits each client's images locally.

Every process calls `make_partition` once, before the first round. Here is what all schemes have in
common: the seeded order of the images, the check of client sizes and the local train-test split.

Suffixes: N images, T images to split, K clients, G groups of images of one class that belong to one
client, or on the server to one domain.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedprompt.config.schema import PartitionConfig
from fedprompt.data.dataset import TEST, TRAIN, VAL, ImageDataset
from fedprompt.data.partition.draws import Indices
from fedprompt.data.partition.file import read_partition
from fedprompt.data.partition.holders import NOBODY, SERVER, Partition
from fedprompt.data.partition.schemes import Images, deal
from fedprompt.errors import UserError
from fedprompt.rng import generator

log = logging.getLogger(__name__)

EXCESS = -1
"""The part of an image that `shots` leaves over."""
FEW_SHOT_VALIDATION = 4
"""Most validation images per class and client in few-shot splits: min(shots, 4), as in CoOp."""


def make_partition(
    dataset: ImageDataset, config: PartitionConfig, seed: int, *, without_labels: bool = False
) -> Partition:
    """Divide the images of a data set among the clients. The result is the same on every machine.

    Args:
        dataset: the images. If the data set itself specifies the owner of each image, neither the
            scheme nor a partition file is used.
        config: the config's `partition` section.
        seed: seed of the experiment.
        without_labels: whether clients without labels train as well.

    Returns:
        The partition: local train, validation and test images of each client, and the server's.

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
    able = partition.able_to_train(without_labels)
    idle = sorted(set(range(partition.num_clients)) - set(able))
    what = "training images" if without_labels else "labelled training images"
    if not able:
        raise UserError(f"partition: no client has {what}.")
    if idle:
        first = ", ".join(map(str, idle[:10])) + (", ..." if len(idle) > 10 else "")
        log.warning(
            "partition: %d of %d clients have no %s and never train: %s",
            len(idle),
            partition.num_clients,
            what,
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
    part_T = _split_locally(owner_T, labels_T, config, seed)
    holder_N, part_N = _of_server(dataset, config, seed)
    # With `shots`, images in excess are in no part and belong to nobody.
    holder_N[train_T] = np.where(part_T != EXCESS, owner_T, NOBODY)
    part_N[train_T] = part_T
    return Partition.of_holders(holder_N, part_N, config.clients, _unlabelled(config, seed))


def _as_owned(
    dataset: ImageDataset, owners_N: Indices, config: PartitionConfig, seed: int
) -> Partition:
    """Return the partition of a data set that itself specifies the owner of each image.

    Each client's images are split with a generator of their own, so that the split is the same on a
    node that holds no other client's images. Clients without images here hold them elsewhere.
    """
    holder_N, part_N = _of_server(dataset, config, seed)
    for client in range(config.clients):
        held = np.flatnonzero((owners_N == client) & (dataset.split_N == TRAIN))
        # An empty client is allowed, because its images may be on another machine.
        if 0 < len(held) < config.min_images:
            raise UserError(
                f"partition: client {client} holds {len(held)} images, partition.min_images asks "
                f"for {config.min_images}."
            )
        if len(held):
            part = _split_locally(owners_N[held], dataset.labels_N[held], config, seed, client)
            holder_N[held] = np.where(part != EXCESS, client, NOBODY)
            part_N[held] = part
    return Partition.of_holders(holder_N, part_N, config.clients, _unlabelled(config, seed))


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


def _of_server(
    dataset: ImageDataset, config: PartitionConfig, seed: int
) -> tuple[Indices, NDArray[np.int8]]:
    """Assign the server's images, and nothing else yet: `holder_N` and `part_N` of `of_holders`.

    The server holds the data set's test images, and its official validation images if the source
    delivers them. With `server_validation_fraction`, a share of each class and domain of the test
    images becomes validation images; at least one image of each stays a test image. Images that a
    protocol holds out have none of these splits; nobody holds them.
    """
    of_server_N = (dataset.split_N == TEST) | (dataset.split_N == VAL)
    holder_N = np.where(of_server_N, SERVER, NOBODY).astype(np.int64)
    part_N = dataset.split_N.astype(np.int8)
    if config.server_validation_fraction:
        test_T = np.flatnonzero(dataset.split_N == TEST)
        rng = generator(seed, "partition", "server-validation")
        groups = _Groups.of(dataset.domains_N[test_T], dataset.labels_N[test_T], rng)
        taken_G = groups.take(config.server_validation_fraction, groups.size_G - 1, rng)
        chosen = groups.rank_T < np.repeat(taken_G, groups.size_G)
        part_N[test_T[groups.by_group_T[chosen]]] = VAL
    return holder_N, part_N


@dataclass(frozen=True, eq=False)
class _Groups:
    """Images in groups of one owner and one class, in a random order within each group.

    Attributes:
        by_group_T: the images, group by group.
        rank_T: position of each image of `by_group_T` within its group.
        owner_G: the owner of each group, ascending: a client, or a domain on the server.
        size_G: number of images of each group.
    """

    by_group_T: Indices
    rank_T: Indices
    owner_G: Indices
    size_G: Indices

    @classmethod
    def of(cls, owner_T: Indices, labels_T: Indices, rng: np.random.Generator) -> _Groups:
        """Group images by owner and class."""
        # One sort groups all images, so the cost hardly depends on the number of groups.
        num_labels = int(labels_T.max(initial=0)) + 1
        key_T = owner_T * num_labels + labels_T
        # The last key of lexsort is the primary one: groups in order, images shuffled within them.
        by_group_T = np.lexsort((rng.permutation(len(key_T)), key_T))
        key_G, start_G, size_G = np.unique(key_T[by_group_T], return_index=True, return_counts=True)
        rank_T = np.arange(len(key_T)) - np.repeat(start_G, size_G)
        return cls(by_group_T, rank_T, key_G // num_labels, size_G)

    def take(self, fraction: float, room_G: Indices, rng: np.random.Generator) -> Indices:
        """How many images to take of each group, so that every owner gives a share of its images.

        With f = `fraction`, floor(f m) of a group's m images are taken. An owner of n images should
        give round(f n); the missing ones come from the groups with the largest remainders, one
        image each (ties at random).

        Args:
            fraction: the share f.
            room_G: the most that may be taken of each group.
            rng: decides between equal remainders.

        Returns:
            The numbers, at most `room_G`.
        """
        taken_G: Indices = np.minimum(np.floor(fraction * self.size_G).astype(np.int64), room_G)
        owners = int(self.owner_G.max(initial=-1)) + 1
        held_K = np.bincount(self.owner_G, self.size_G, minlength=owners)
        given_K = np.bincount(self.owner_G, taken_G, minlength=owners)
        # Rounds half up; np.round would round half to even.
        missing_K = np.floor(fraction * held_K + 0.5) - given_K
        # Rounded, so that float noise does not decide between equal remainders.
        remainder_G = np.round(fraction * self.size_G - taken_G, 9)
        ranked_G = np.lexsort((rng.random(len(self.size_G)), -remainder_G, self.owner_G))
        has_room_G = (remainder_G > 0) & (room_G > taken_G)
        ranked_G = ranked_G[has_room_G[ranked_G]]
        # Rank within the owner: position among all ranked groups minus that of the owner's first.
        first_G = np.searchsorted(self.owner_G[ranked_G], self.owner_G[ranked_G])
        rank_G = np.arange(len(ranked_G)) - first_G
        taken_G[ranked_G[rank_G < missing_K[self.owner_G[ranked_G]]]] += 1
        return taken_G


def _split_locally(
    owner_T: Indices, labels_T: Indices, config: PartitionConfig, seed: int, *purpose: int
) -> NDArray[np.int8]:
    """Split the images of every client into train, validation and test, class by class.

    Test images are drawn first and do not depend on the keys for validation, so results with and
    without validation images are measured on the same tests. At least one image of every class
    stays in train; classes with a single image are never tested locally.

    Validation images are `local_validation_fraction` of a client's images. In few-shot splits
    (`shots`), they are min(shots, 4) per class if the fraction is not 0, which CoOp uses, and come
    from the images in excess of the shots; a class that has too few is divided between train and
    validation in the proportion of the two numbers.

    Args:
        owner_T: client of each image.
        labels_T: class of each image.
        config: the fractions, and `shots`, the largest number of training images per client and
            class.
        seed: seed of the experiment.
        purpose: keys of the random draws: the client, if every client's images are split alone.

    Returns:
        `TRAIN`, `VAL`, `TEST` or `EXCESS` for each image (T,).
    """
    rng = generator(seed, "partition", "local-split", *purpose)
    groups = _Groups.of(owner_T, labels_T, rng)
    size_G = groups.size_G
    test_G = groups.take(config.local_test_fraction, size_G - 1, rng)
    rest_G = size_G - test_G
    validation_G = np.zeros_like(size_G)
    if config.local_validation_fraction and config.shots is not None:
        most = min(config.shots, FEW_SHOT_VALIDATION)
        validation_G = np.minimum(most, rest_G * most // (config.shots + most))
    elif config.local_validation_fraction:
        # A generator of its own: the draws of the test images stay what they are without it.
        draws = generator(seed, "partition", "local-validation", *purpose)
        validation_G = groups.take(config.local_validation_fraction, rest_G - 1, draws)
    train_G = rest_G - validation_G
    if config.shots is not None:
        train_G = np.minimum(train_G, config.shots)

    # Each group's images in order: test, train, validation, and what `shots` leaves over.
    part_T = np.full(len(owner_T), EXCESS, dtype=np.int8)
    ends = np.cumsum([test_G, train_G, validation_G], axis=0)
    for part, end_G in reversed(list(zip((TEST, TRAIN, VAL), ends, strict=True))):
        part_T[groups.by_group_T[groups.rank_T < np.repeat(end_G, size_G)]] = part
    return part_T
