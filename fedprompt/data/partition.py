"""Who holds which image: training images are dealt to clients, then split locally.

Clients share out the TRAIN images only; the TEST images stay with the server. Each client's own
images are split into local train and local test, class by class, so local test follows local
train and never overlaps it.

The rules are our own NumPy code rather than flwr-datasets' partitioners (0.6.1), for reasons read
in their source: `IidPartitioner` cuts the data set in its stored order, without a shuffle;
`DirichletPartitioner` does likewise within a class, and gives up after 11 draws, which many
clients do not survive (alpha 0.1, 21,600 images, 10 classes, at least 2 images each: of 20 seeds
none fails with 100 clients, 12 with 200, all with 500); `PathologicalPartitioner` may draw classes
for nobody, and leaves them out. Importing them takes seconds, which a deployed client would pay
with every message. On the same shuffled images and with the same seed our Dirichlet deal is
theirs, image by image (tested).

Suffixes: N images, T training images, K clients, C classes, D domains, G (client, class) groups.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedprompt.config import PartitionConfig
from fedprompt.data.base import TEST, TRAIN, ImageDataset
from fedprompt.errors import UserError
from fedprompt.rng import generator

Indices = NDArray[np.int64]
DIRICHLET_DRAWS = 11  # as many as flwr-datasets tries
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Partition:
    """Image indices per client, compact: client k owns `flat[offsets[k]:offsets[k + 1]]`.

    Indices point into the `ImageDataset` the partition was made from, ascending per client.
    `server_test` holds all TEST images.
    """

    train_flat: Indices
    train_offsets: Indices
    test_flat: Indices
    test_offsets: Indices
    server_test: Indices

    @property
    def num_clients(self) -> int:
        """Number of clients K."""
        return len(self.train_offsets) - 1

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
        UserError: the scheme cannot be met with these images; the message has the numbers.
    """
    train_T = np.flatnonzero(dataset.split_N == TRAIN).astype(np.int64)
    labels_T = dataset.labels_N[train_T]
    _check_enough(len(train_T), config)
    order_T = generator(seed, "partition", "order").permutation(len(train_T))
    if config.scheme == "iid":
        owner_T = _deal(order_T, np.arange(config.clients), len(train_T))
    elif config.scheme == "dirichlet":
        owner_T = _dirichlet(labels_T, order_T, config, seed)
    elif config.scheme == "pathological":
        owner_T = _pathological(labels_T, order_T, dataset.class_names, config, seed)
    else:
        owner_T = _by_domain(dataset.domains_N[train_T], order_T, dataset.domain_names, config)
    sizes_K = np.bincount(owner_T, minlength=config.clients)
    if sizes_K.min() < config.min_images:
        client = int(sizes_K.argmin())
        raise UserError(
            f"partition: scheme '{config.scheme}' leaves client {client} {sizes_K[client]} of "
            f"{len(train_T)} training images, partition.min_images asks for {config.min_images}; "
            f"lower it or partition.clients ({config.clients})."
        )
    train_mask, test_mask = _split_locally(owner_T, labels_T, config, seed)
    train_flat, train_offsets = _group(train_T, owner_T, train_mask, config.clients)
    test_flat, test_offsets = _group(train_T, owner_T, test_mask, config.clients)
    server_test = np.flatnonzero(dataset.split_N == TEST).astype(np.int64)
    arrays = (train_flat, train_offsets, test_flat, test_offsets, server_test)
    for array in arrays:
        array.flags.writeable = False
    return Partition(*arrays)


def describe(dataset: ImageDataset, partition: Partition) -> dict[str, Any]:
    """The partition as counts, ready for JSON: what a run folder's `partition.json` holds.

    `train_counts` and `test_counts` are K x C, `domain_counts` is K x D over a client's local
    train and test images together, `server_test_counts` has one number per class.
    """
    num_classes, num_domains = len(dataset.class_names), len(dataset.domain_names)
    domain_KD = _counts(
        partition.train_flat, partition.train_offsets, dataset.domains_N, num_domains
    ) + _counts(partition.test_flat, partition.test_offsets, dataset.domains_N, num_domains)
    server_C = np.bincount(dataset.labels_N[partition.server_test], minlength=num_classes)
    return {
        "class_names": list(dataset.class_names),
        "domain_names": list(dataset.domain_names),
        "train_counts": partition.train_counts(dataset.labels_N, num_classes).tolist(),
        "test_counts": partition.test_counts(dataset.labels_N, num_classes).tolist(),
        "domain_counts": domain_KD.tolist(),
        "server_test_counts": server_C.tolist(),
    }


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


def _deal(members: Indices, owners: Indices, total: int) -> Indices:
    """Owner of each of `total` images: `members` cut into equal runs (within 1) for `owners`."""
    owner_T = np.full(total, -1, dtype=np.int64)
    owner_T[members] = owners[np.arange(len(members)) * len(owners) // len(members)]
    return owner_T


def _dirichlet(labels_T: Indices, order_T: Indices, config: PartitionConfig, seed: int) -> Indices:
    """Per class, shares over clients ~ Dir(alpha) (Hsu et al., 2019, arXiv 1909.06335).

    A draw that leaves a client short of `min_images` is repeated. After `DIRICHLET_DRAWS` of them
    the last one is kept and short clients are topped up from the largest ones, with a warning:
    otherwise many clients at a small alpha could never be had.
    """
    rng = generator(seed, "partition", "dirichlet")
    members_C = [order_T[labels_T[order_T] == label] for label in np.unique(labels_T)]
    owner_T = np.empty(len(labels_T), dtype=np.int64)
    for _ in range(DIRICHLET_DRAWS):
        for members in members_C:
            shares_K = rng.dirichlet(np.full(config.clients, config.alpha))
            if not np.isfinite(shares_K).all():
                raise UserError(f"partition: no shares can be drawn at alpha {config.alpha}.")
            cuts = (np.cumsum(shares_K)[:-1] * len(members)).astype(np.int64)
            bounds = np.concatenate(([0], np.minimum(cuts, len(members)), [len(members)]))
            owner_T[members] = np.repeat(np.arange(config.clients), np.diff(bounds))
        if np.bincount(owner_T, minlength=config.clients).min() >= config.min_images:
            return owner_T
    return _top_up(owner_T, order_T, config)


def _top_up(owner_T: Indices, order_T: Indices, config: PartitionConfig) -> Indices:
    """Give every client `min_images` by moving random images from whoever then holds most."""
    sizes_K = np.bincount(owner_T, minlength=config.clients)
    grouped = order_T[np.argsort(owner_T[order_T], kind="stable")]
    starts_K = np.cumsum(sizes_K) - sizes_K
    short = np.repeat(np.arange(config.clients), np.maximum(config.min_images - sizes_K, 0))
    for client in short:
        donor = sizes_K.argmax()
        sizes_K[donor] -= 1
        owner_T[grouped[starts_K[donor] + sizes_K[donor]]] = client
        sizes_K[client] += 1
    log.warning(
        "partition: %d of %d clients were short of %d images after %d Dirichlet draws at alpha "
        "%g; %d images were moved to them from the largest clients",
        len(np.unique(short)),
        config.clients,
        config.min_images,
        DIRICHLET_DRAWS,
        config.alpha,
        len(short),
    )
    return owner_T


def _pathological(
    labels_T: Indices,
    order_T: Indices,
    class_names: tuple[str, ...],
    config: PartitionConfig,
    seed: int,
) -> Indices:
    """Each client holds exactly `classes_per_client` classes (McMahan et al., 2017).

    Clients in turn take the classes with the fewest owners so far, ties at random: every class
    finds owners, and their numbers differ by one at most. A class is dealt evenly to its owners.
    """
    num_classes, each = len(class_names), config.classes_per_client
    if each > num_classes:
        raise UserError(
            f"partition: classes_per_client is {each}, the data set has {num_classes} classes."
        )
    if config.clients * each < num_classes:
        raise UserError(
            f"partition: {config.clients} clients with {each} classes each cannot hold all "
            f"{num_classes} classes; raise partition.clients or partition.classes_per_client."
        )
    rng = generator(seed, "partition", "pathological")
    owned_KC = np.zeros((config.clients, num_classes), dtype=bool)
    owners_C = np.zeros(num_classes, dtype=np.int64)
    for client in range(config.clients):
        chosen = np.lexsort((rng.random(num_classes), owners_C))[:each]
        owned_KC[client, chosen] = True
        owners_C[chosen] += 1
    owner_T = np.empty(len(labels_T), dtype=np.int64)
    for label, name in enumerate(class_names):
        members = order_T[labels_T[order_T] == label]
        owners = np.flatnonzero(owned_KC[:, label])
        if len(members) < len(owners):
            raise UserError(
                f"partition: class '{name}' has {len(members)} training images for "
                f"{len(owners)} clients; lower partition.clients or partition.classes_per_client."
            )
        owner_T[members] = _deal(members, owners, len(labels_T))[members]
    return owner_T


def _by_domain(
    domains_T: Indices, order_T: Indices, domain_names: tuple[str, ...], config: PartitionConfig
) -> Indices:
    """Client k holds images of domain k mod D, dealt evenly at random among its clients."""
    num_domains = len(domain_names)
    if num_domains < 2:
        raise UserError(
            "partition: scheme 'domain' needs a data set with two or more domains; this one has "
            "one. Use partition.scheme=iid."
        )
    if config.clients < num_domains:
        raise UserError(
            f"partition: {config.clients} clients cannot cover {num_domains} domains; "
            "raise partition.clients or use fewer domains."
        )
    owner_T = np.empty(len(domains_T), dtype=np.int64)
    for domain in range(num_domains):
        members = order_T[domains_T[order_T] == domain]
        if len(members):
            owners = np.arange(domain, config.clients, num_domains)
            owner_T[members] = _deal(members, owners, len(domains_T))[members]
    return owner_T


def _split_locally(
    owner_T: Indices, labels_T: Indices, config: PartitionConfig, seed: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Masks of local train and local test images.

    A class of m local images gives floor(f m) of them to test; the client's rounded share f n is
    then made up from the classes with the largest remainders, one image each (ties at random). A
    class always keeps one image in train, so classes of one image are never tested locally.
    """
    rng = generator(seed, "partition", "local-split")
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


def _group(
    train_T: Indices, owner_T: Indices, mask_T: NDArray[np.bool_], clients: int
) -> tuple[Indices, Indices]:
    chosen = np.flatnonzero(mask_T)
    chosen = chosen[np.argsort(owner_T[chosen], kind="stable")]
    sizes_K = np.bincount(owner_T[chosen], minlength=clients)
    return train_T[chosen], np.concatenate(([0], np.cumsum(sizes_K))).astype(np.int64)


def _counts(flat: Indices, offsets: Indices, values_N: Indices, num_values: int) -> Indices:
    clients = len(offsets) - 1
    client = np.repeat(np.arange(clients), np.diff(offsets))
    cells = np.bincount(client * num_values + values_N[flat], minlength=clients * num_values)
    return cells.reshape(clients, num_values).astype(np.int64)
