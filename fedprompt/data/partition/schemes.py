"""The schemes that divide the training images among the clients, one function each.

A scheme receives the images in a seeded random order, so that "the first few" of them are a random
few, and assigns every image to a client. `assign.make_partition` calls it, checks the sizes and
splits each client's images locally. A new scheme is a function here and an entry in `SCHEMES`.

The schemes are our own NumPy code rather than flwr-datasets' partitioners (0.6.1), for reasons
found in their source. `IidPartitioner` cuts the data set in its stored order, without a shuffle.
`DirichletPartitioner` does the same within a class, and gives up after 11 draws, which is too few
for many clients (alpha 0.1, 21,600 images, 10 classes, at least 2 images each: of 20 seeds, none
fails with 100 clients, 12 fail with 200, and all fail with 500). `PathologicalPartitioner` may
assign a class to no client, and omits its images. Importing them takes seconds, which a deployed
client would spend on every message. On the same shuffled images and with the same seed, our
Dirichlet partition equals theirs, image by image (tested).

Suffixes: M images in their random order, K clients, C classes, D domains, S superclasses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedprompt.config.schema import PartitionConfig
from fedprompt.data.partition.draws import (
    Indices,
    apportion,
    draw_counts,
    draw_shares,
    enough_for_all,
    label_skew,
    runs,
)
from fedprompt.errors import UserError
from fedprompt.rng import generator


@dataclass(frozen=True, eq=False)
class Images:
    """What a scheme knows of the training images, in their seeded random order.

    Attributes:
        labels_M: class of each image.
        domains_M: domain of each image.
        class_names: names of the C classes, in label order.
        domain_names: names of the D domains.
        superclass_names: the superclass of each class; empty where the data set has none.
    """

    labels_M: Indices
    domains_M: Indices
    class_names: tuple[str, ...]
    domain_names: tuple[str, ...]
    superclass_names: tuple[str, ...]

    def __len__(self) -> int:
        """Number of images M."""
        return len(self.labels_M)


def deal(images: Images, config: PartitionConfig, seed: int) -> Indices:
    """Assign every image to a client by the scheme that the config names.

    Args:
        images: the training images.
        config: the config's `partition` section.
        seed: seed of the experiment.

    Returns:
        The client (M,) of every image.

    Raises:
        UserError: the scheme is impossible with these images; the message contains the numbers.
    """
    return SCHEMES[config.scheme](images, config, seed)


def _iid(images: Images, config: PartitionConfig, seed: int) -> Indices:
    # No draw is needed: the images are already in random order.
    return runs(len(images), np.arange(config.clients))


def _dirichlet(images: Images, config: PartitionConfig, seed: int) -> Indices:
    """Per class, shares over clients ~ Dir(alpha) (Hsu et al., 2019, arXiv 1909.06335)."""
    rng = generator(seed, "partition", "dirichlet")
    return label_skew(images.labels_M, config.clients, config, rng)


def _pathological(images: Images, config: PartitionConfig, seed: int) -> Indices:
    """Each client holds exactly `classes_per_client` classes (after McMahan et al., 2017).

    Clients in turn take the classes with the fewest owners so far, ties at random. Every class
    therefore has an owner, and numbers of owners differ by at most one. The images of a class are
    divided evenly among its owners.
    """
    num_classes, each = len(images.class_names), config.classes_per_client
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
        # The last key is the primary one: fewest owners first, ties in random order.
        chosen = np.lexsort((rng.random(num_classes), owners_C))[:each]
        owned_KC[client, chosen] = True
        owners_C[chosen] += 1
    owner_M = np.empty(len(images), dtype=np.int64)
    for label, name in enumerate(images.class_names):
        members = np.flatnonzero(images.labels_M == label)
        owners = np.flatnonzero(owned_KC[:, label])
        if len(members) < len(owners):
            raise UserError(
                f"partition: class '{name}' has {len(members)} training images for "
                f"{len(owners)} clients; lower partition.clients or partition.classes_per_client."
            )
        owner_M[members] = runs(len(members), owners)
    return owner_M


def _shards(images: Images, config: PartitionConfig, seed: int) -> Indices:
    """Images sorted by class are cut into equal shards, `shards_per_client` for each client.

    McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data,
    AISTATS 2017 (two shards per client). All clients hold equally many images, up to the rounding
    of shards. They hold `shards_per_client` classes, or a few more where a shard spans a boundary
    between classes.
    """
    shards = config.clients * config.shards_per_client
    if shards > len(images):
        raise UserError(
            f"partition: {shards} shards cannot be cut from {len(images)} training images; lower "
            "partition.clients or partition.shards_per_client."
        )
    rng = generator(seed, "partition", "shards")
    client_of_shard = rng.permutation(shards) % config.clients
    owner_M = np.empty(len(images), dtype=np.int64)
    # A stable sort keeps the images of a class in their random order.
    owner_M[np.argsort(images.labels_M, kind="stable")] = runs(len(images), client_of_shard)
    return owner_M


def _disjoint_classes(images: Images, config: PartitionConfig, seed: int) -> Indices:
    """Every class belongs to one client; numbers of classes per client differ by at most one.

    The few-shot split of FedOTP (H. Li et al., CVPR 2024) and its successors is similar, but gives
    round(C / K) classes to all clients except the last, which takes the rest.
    """
    # A class without training images would leave its client without any.
    present = np.unique(images.labels_M)
    if config.clients > len(present):
        raise UserError(
            f"partition: {config.clients} clients cannot each have classes of their own, there "
            f"are {len(present)}; lower partition.clients or use partition.scheme=pathological."
        )
    shuffled = generator(seed, "partition", "classes").permutation(present)
    owner_C = np.zeros(len(images.class_names), dtype=np.int64)
    owner_C[shuffled] = runs(len(present), np.arange(config.clients))
    return owner_C[images.labels_M]


def _quantity(images: Images, config: PartitionConfig, seed: int) -> Indices:
    """Client sizes ~ Dir(alpha); labels are not considered.

    Q. Li, Y. Diao, Q. Chen, B. He. Federated Learning on Non-IID Data Silos: An Experimental
    Study. ICDE 2022, arXiv 2102.02079 ("quantity skew").
    """
    rng = generator(seed, "partition", "quantity")

    def draw() -> Indices:
        return apportion(draw_shares(rng, config.clients, config.alpha), len(images))

    return enough_for_all(
        lambda: np.repeat(np.arange(config.clients), draw()), config.clients, config
    )


def _power_law(images: Images, config: PartitionConfig, seed: int) -> Indices:
    """The r-th largest client's size is proportional to r^-exponent; labels are not considered.

    "The number of samples per device follows a power law" is a setting of T. Li et al., Federated
    Optimization in Heterogeneous Networks (FedProx), MLSys 2020. They do not state the form of the
    law; this one is ours. Every client first receives `min_images`; the rest follows the law.
    """
    weights = np.arange(1, config.clients + 1, dtype=np.float64) ** -config.exponent
    # Permuted: otherwise client 0 would always be the largest.
    shares_K = generator(seed, "partition", "power law").permutation(weights / weights.sum())
    rest = len(images) - config.clients * config.min_images
    sizes_K = config.min_images + apportion(shares_K, rest)
    return np.repeat(np.arange(config.clients), sizes_K)


def _by_domain(images: Images, config: PartitionConfig, seed: int) -> Indices:
    """Each client holds images of one domain; a domain is divided evenly among its clients."""
    owner_M = np.empty(len(images), dtype=np.int64)
    for domain, owners in _clients_of_domains(images, config).items():
        members = np.flatnonzero(images.domains_M == domain)
        owner_M[members] = runs(len(members), owners)
    return owner_M


def _domain_dirichlet(images: Images, config: PartitionConfig, seed: int) -> Indices:
    """Each client holds images of one domain; its classes are divided in shares ~ Dir(alpha).

    W. Bo et al., FedMGP, NeurIPS 2025, arXiv 2511.00480, divide DomainNet among 30 clients and
    Office-Caltech10 among 20 clients in this way (alpha 0.3).
    """
    owner_M = np.empty(len(images), dtype=np.int64)
    for domain, owners in _clients_of_domains(images, config).items():
        members, name = np.flatnonzero(images.domains_M == domain), images.domain_names[domain]
        if len(members) < len(owners) * config.min_images:
            raise UserError(
                f"partition: domain '{name}' has {len(members)} training images for {len(owners)} "
                f"clients with at least {config.min_images} each; lower partition.clients or "
                "partition.min_images."
            )
        # Keyed by domain, so that the draws of one domain do not depend on the other domains.
        rng = generator(seed, "partition", "domain-dirichlet", int(domain))
        own = label_skew(images.labels_M[members], len(owners), config, rng)
        owner_M[members] = owners[own]
    return owner_M


def _superclass_dirichlet(images: Images, config: PartitionConfig, seed: int) -> Indices:
    """Equal clients draw superclasses ~ Dir(alpha), and classes within them ~ Dir(alpha_within).

    This is the Pachinko allocation of S. Reddi et al., Adaptive Federated Optimization, ICLR 2021,
    arXiv 2003.00295, designed for CIFAR-100 (alpha 0.1, alpha_within 10). Clients draw one after
    another without replacement, so the last clients receive what is left. Every image is assigned.
    """
    names = images.superclass_names
    if not names:
        raise UserError(
            "partition: scheme 'superclass_dirichlet' needs a data set whose classes have "
            "superclasses, such as data=cifar100."
        )
    groups = sorted(set(names))
    classes_S = [np.flatnonzero([name == group for name in names]) for group in groups]
    members_C = [np.flatnonzero(images.labels_M == label) for label in range(len(names))]
    left_C = np.array([len(members) for members in members_C], dtype=np.int64)
    rng = generator(seed, "partition", "superclass")
    owner_M = np.empty(len(images), dtype=np.int64)
    sizes_K = np.bincount(runs(len(images), np.arange(config.clients)))
    for client, size in enumerate(sizes_K):
        shares_S = draw_shares(rng, len(groups), config.alpha)
        left_S = np.array([left_C[classes].sum() for classes in classes_S])
        for classes, wanted in zip(
            classes_S, draw_counts(rng, size, shares_S, left_S), strict=True
        ):
            within = draw_shares(rng, len(classes), config.alpha_within)
            taken = draw_counts(rng, wanted, within, left_C[classes])
            for label, count in zip(classes, taken, strict=True):
                # Images are in random order, so the next `count` images are a random draw.
                start = len(members_C[label]) - left_C[label]
                owner_M[members_C[label][start : start + count]] = client
                left_C[label] -= count
    return owner_M


SCHEMES: dict[str, Callable[[Images, PartitionConfig, int], Indices]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "pathological": _pathological,
    "shards": _shards,
    "disjoint_classes": _disjoint_classes,
    "quantity": _quantity,
    "power_law": _power_law,
    "domain": _by_domain,
    "domain_dirichlet": _domain_dirichlet,
    "superclass_dirichlet": _superclass_dirichlet,
}


def _clients_of_domains(images: Images, config: PartitionConfig) -> dict[int, Indices]:
    """Assign clients to the domains that have training images.

    With `domain_clients=equal`, client k belongs to the domain numbered k modulo their number. With
    `proportional`, each domain has a run of consecutive clients: every domain starts with one, and
    each further client joins the domain with the most images per client.
    """
    present, sizes_D = np.unique(images.domains_M, return_counts=True)
    if len(present) < 2:
        raise UserError(
            f"partition: scheme '{config.scheme}' needs a data set with two or more domains; this "
            "one has one. Use partition.scheme=iid."
        )
    if config.clients < len(present):
        raise UserError(
            f"partition: {config.clients} clients cannot cover {len(present)} domains; "
            "raise partition.clients or use fewer domains."
        )
    if config.domain_clients == "equal":
        owners = [np.arange(d, config.clients, len(present)) for d in range(len(present))]
    else:
        clients_D = np.ones(len(present), dtype=np.int64)
        for _ in range(config.clients - len(present)):
            clients_D[(sizes_D / clients_D).argmax()] += 1
        owners = np.split(np.arange(config.clients), np.cumsum(clients_D)[:-1])
    return {int(d): own for d, own in zip(present, owners, strict=True)}
