"""What a client and the server hold besides messages: CLIP, data, features and the method."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.clip import FrozenCLIP, load_clip
from fedprompt.config import Config
from fedprompt.data import open_dataset
from fedprompt.data.base import ImageDataset
from fedprompt.data.cache import cached_features, default_cache_dir
from fedprompt.data.partition import Partition, describe, make_partition
from fedprompt.methods import Method, Task, Tensors, method_class
from fedprompt.methods.base import stack
from fedprompt.training import ClientData

KEPT_BYTES = 64
"""Bytes kept per text position, layer and unit of width: about 14 float32 numbers, rounded up."""


class Workspace:
    """The frozen side of an experiment, opened once per process and only read afterwards."""

    def __init__(
        self,
        config: Config,
        clip: FrozenCLIP,
        dataset: ImageDataset,
        partition: Partition,
        features_ND: NDArray[np.float32],
    ) -> None:
        self.config = config
        self.clip = clip
        self.dataset = dataset
        self.partition = partition
        self.features_ND = features_ND
        self.task = Task(dataset.class_names, tuple(config.data.templates))
        self.method: Method = method_class(config.method.name)(config.method, clip, self.task)
        self._server_test: tuple[Tensor, Tensor] | None = None

    @classmethod
    def open(cls, config: Config, *, progress: bool = True) -> Workspace:
        """Load CLIP, open the data set, deal the partition, encode images that no cache holds.

        Raises:
            UserError: weights or data that cannot be had or do not fit the config.
        """
        cache_dir = default_cache_dir(config.output.cache)
        # Cheap checks first: a partition that cannot be met is refused before images are encoded.
        dataset = open_dataset(config.data, config.seed, cache_dir)
        partition = make_partition(dataset, config.partition, config.seed)
        clip = load_clip(config.backbone, cache_dir)
        features_ND = cached_features(clip, dataset, cache_dir, progress=progress)
        return cls(config, clip, dataset, partition, features_ND)

    def with_method(self, method_config: Any) -> Workspace:
        """The same data and backbone under another method."""
        config = replace(self.config, method=method_config)
        return Workspace(config, self.clip, self.dataset, self.partition, self.features_ND)

    @property
    def num_clients(self) -> int:
        """Number of clients K; their ids are 0 .. K - 1."""
        return self.config.partition.clients

    @cached_property
    def shared_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the method shares; all are float32."""
        start = self.method.init_shared(self.config.seed)
        return {name: tuple(tensor.shape) for name, tensor in start.items()}

    @cached_property
    def tokens_per_client(self) -> int:
        """Text positions that the method sends through the tower for one client and step."""
        shared = self.method.init_shared(self.config.seed)
        private = self.start_private(0)
        before = self.clip.positions_encoded
        with torch.no_grad():
            self.method.encode(
                stack([shared], self.clip.device), stack([private], self.clip.device)
            )
        return self.clip.positions_encoded - before

    @property
    def step_bytes_per_client(self) -> int:
        """Bytes that one client's training step keeps for its gradient, roughly."""
        parts = self.clip.text
        return self.tokens_per_client * len(parts.blocks) * parts.width * KEPT_BYTES

    def train_data(self, client: int) -> ClientData:
        """A client's local training images."""
        return ClientData(client, *self._rows(self.partition.train(client)))

    def test_data(self, client: int) -> tuple[Tensor, Tensor]:
        """A client's local test images: features (n, D), labels (n,); n may be 0."""
        return self._rows(self.partition.test(client))

    def server_test(self) -> tuple[Tensor, Tensor]:
        """The server's test images: features (n, D), labels (n,)."""
        if self._server_test is None:
            self._server_test = self._rows(self.partition.server_test)
        return self._server_test

    def start_private(self, client: int) -> Tensors:
        """A client's private tensors before it has ever trained."""
        return self.method.init_private(self.config.seed, client)

    def describe(self) -> dict[str, Any]:
        """Counts of clients x classes and domains, for `partition.json` and its plot."""
        return describe(self.dataset, self.partition)

    def _rows(self, index: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        features = torch.from_numpy(np.asarray(self.features_ND[index], dtype=np.float32))
        return F.normalize(features, dim=-1), torch.from_numpy(self.dataset.labels_N[index])
