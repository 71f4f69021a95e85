"""Artificial federations of exact sizes: seeded random features, real class names.

Shape suffixes: K clients, N images, D joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.bench.reference import ReferenceClient, ReferenceCoOp
from fedprompt.config.schema import Config
from fedprompt.data.dataset import TEST, TRAIN, ImageDataset
from fedprompt.data.features.table import FeatureTable
from fedprompt.data.partition import SERVER, Partition
from fedprompt.experiment.validate import validate
from fedprompt.rng import generator
from fedprompt.workspace import Workspace

SEED = 1
LEARNING_RATE = 1.0
"""Large, so that a step moves a prompt by far more than float32 rounding."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of images: `train` and `test` for each of K `clients`, `server_test` for the server.

    Images are numbered client by client, training images before test images; the server's are last.
    """

    clients: int
    train: int
    test: int = 0
    server_test: int = 0

    @property
    def per_client(self) -> int:
        """Images of one client."""
        return self.train + self.test

    @property
    def images(self) -> int:
        """All images N."""
        return self.clients * self.per_client + self.server_test


def settings(clients: int, **sections: Any) -> Config:
    """A config for benchmarks.

    Args:
        clients: number of clients.
        sections: merged over the config.

    Returns:
        The validated config: PromptFL and FedAvg on the tiny backbone unless `sections` says
        otherwise.
    """
    raw: dict[str, Any] = {
        "experiment": "bench",
        "seed": SEED,
        "backbone": {"model": "tiny", "device": "cpu"},
        "partition": {"clients": clients},
        "method": {"name": "promptfl"},
        "strategy": {"name": "fedavg"},
        "training": {"lr": LEARNING_RATE, "batch_size": 8, "weight_decay": 0.0},
        "evaluation": {"local_only": False, "personal_on_global": False},
        "output": {"report": False},
    }
    for key, value in sections.items():
        raw[key] = {**raw.get(key, {}), **value}
    return validate(raw)


def make_workspace(
    clip: FrozenCLIP,
    class_names: Sequence[str],
    sizes: Sizes,
    features_ND: Tensor | None = None,
    **sections: Any,
) -> Workspace:
    """A workspace with exactly these images.

    Args:
        clip: the frozen backbone.
        class_names: names of the classes.
        sizes: numbers of images.
        features_ND: image features; random ones when None.
        sections: merged over the config.
    """
    if features_ND is None:
        features_ND = random_features(sizes.images, clip.embed_dim)
    number_N = np.arange(sizes.images, dtype=np.int64)
    dataset = make_dataset(class_names, sizes.images, sizes.clients * sizes.per_client)
    image_KN = number_N[: sizes.clients * sizes.per_client].reshape(sizes.clients, sizes.per_client)
    holder_N = np.full(sizes.images, SERVER, dtype=np.int64)
    holder_N[image_KN] = np.arange(sizes.clients)[:, None]
    part_N = np.full(sizes.images, TEST, dtype=np.int8)
    part_N[image_KN[:, : sizes.train]] = TRAIN
    partition = Partition.of_holders(holder_N, part_N, sizes.clients)
    config = settings(sizes.clients, **sections)
    return Workspace(config, clip, dataset, partition, [FeatureTable(features_ND.numpy())])


def make_dataset(class_names: Sequence[str], images: int, train: int) -> ImageDataset:
    """Images of which nothing but the labels exists.

    Args:
        class_names: names of the classes.
        images: N.
        train: how many of them, from the first, are training images.
    """
    return ImageDataset(
        name="bench",
        class_names=tuple(class_names),
        # Random labels suffice: speed does not depend on them.
        labels_N=make_labels(images, len(class_names)),
        split_N=np.where(np.arange(images) < train, TRAIN, TEST).astype(np.int8),
        domains_N=np.zeros(images, dtype=np.int64),
        domain_names=("bench",),
        fingerprint="bench",
        open_image=_no_picture,
    )


def make_labels(count: int, classes: int) -> NDArray[np.int64]:
    """Seeded labels (count,)."""
    return generator(SEED, "labels").integers(0, classes, count)


def random_features(count: int, width: int) -> Tensor:
    """Seeded image features (count, D), N(0, 1)."""
    draw = generator(SEED, "features").standard_normal((count, width), dtype=np.float32)
    return torch.from_numpy(draw)


def reference_clients(
    workspace: Workspace, images_N3HW: Tensor, clients: Sequence[int] | None = None
) -> list[ReferenceClient]:
    """The clients of a workspace with their images, for the reference.

    Args:
        workspace: labels and partition.
        images_N3HW: preprocessed images; it may end after the last one that the clients need.
        clients: which clients; all when None.

    Returns:
        The clients in the order of `clients`.
    """
    with_images = []
    for client in range(workspace.num_clients) if clients is None else clients:
        train = torch.tensor(workspace.partition.train(client))
        test = torch.tensor(workspace.partition.test(client))
        labels_N = torch.from_numpy(workspace.dataset.labels_N)
        with_images.append(
            ReferenceClient(
                client, images_N3HW[train], labels_N[train], images_N3HW[test], labels_N[test]
            )
        )
    return with_images


def reference_model(workspace: Workspace) -> ReferenceCoOp:
    """The reference's model with the workspace's initial context."""
    start = workspace.method.init_shared(workspace.config.seed)["ctx"]
    return ReferenceCoOp(workspace.clip, workspace.task.class_names, start)


def _no_picture(index: int) -> Image.Image:
    raise NotImplementedError(f"image {index} of a benchmark exists as a tensor or feature only")
