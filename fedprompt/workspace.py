"""What several runs of one process share: the frozen backbone and data sets, opened once.

Both are only read, so a run on them gives the same bits as one that opened its own. Files that
change while the process lives are not looked at again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import load_clip
from fedprompt.config.schema import BackboneConfig, Config, DataConfig
from fedprompt.data import open_dataset
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.features.cache import default_cache_dir
from fedprompt.data.features.inputs import Inputs
from fedprompt.data.features.table import FeatureTable, open_feature_table
from fedprompt.data.held_out import HeldOut
from fedprompt.data.partition import Partition, describe, make_partition
from fedprompt.errors import UserError
from fedprompt.evaluation.registry import Protocol, hold_out, open_protocols
from fedprompt.methods.base import ClientData, Method, Task, Tensors, stack
from fedprompt.methods.registry import method_class

DATASETS_KEPT = 8
"""Data sets that stay open: as many seeds of one, say, since each seed may split it anew."""


class ResourceCache:
    """The last backbone and the last few data sets."""

    def __init__(self) -> None:
        self._clip: tuple[str, FrozenCLIP] | None = None
        self._datasets: OrderedDict[str, ImageDataset] = OrderedDict()

    def clip(self, config: BackboneConfig, cache_dir: Path) -> FrozenCLIP:
        """`load_clip`, or what it gave for the same config; another backbone is let go first."""
        key = f"{config!r} {cache_dir}"
        if self._clip is None or self._clip[0] != key:
            self._clip = None
            self._clip = key, load_clip(config, cache_dir)
        return self._clip[1]

    def dataset(self, config: DataConfig, seed: int, cache_dir: Path) -> ImageDataset:
        """`open_dataset`, or what it gave for the same config and seed."""
        key = f"{config!r} {seed} {cache_dir}"
        if key not in self._datasets:
            self._datasets[key] = open_dataset(config, seed, cache_dir)
        self._datasets.move_to_end(key)
        while len(self._datasets) > DATASETS_KEPT:
            self._datasets.popitem(last=False)
        return self._datasets[key]


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
        views: Sequence[FeatureTable],
        held_out: HeldOut | None = None,
    ) -> None:
        self.config = config
        self.clip = clip
        self.dataset = dataset
        self.partition = partition
        self.views = tuple(views)
        self.held_out = held_out
        self.task = Task(dataset.class_names, tuple(config.data.templates))
        self.method: Method = method_class(config.method.name)(config.method, clip, self.task)
        self._methods = {self.task: self.method}
        self._server_test: tuple[Inputs, Tensor] | None = None

    @classmethod
    def open(
        cls, config: Config, *, progress: bool = True, resources: ResourceCache | None = None
    ) -> Workspace:
        """Load CLIP, open the data set, deal the partition, encode images that no cache holds.

        `resources` keeps backbone and data set for the next workspace of this process.

        Raises:
            UserError: weights or data that cannot be had or do not fit the config.
        """
        resources = resources or ResourceCache()
        cache_dir = default_cache_dir(config.output.cache)
        # Cheap checks first: a partition that cannot be met is refused before images are encoded.
        dataset = resources.dataset(config.data, config.seed, cache_dir)
        dataset, held_out = hold_out(config, dataset)
        partition = make_partition(dataset, config.partition, config.seed)
        clip = resources.clip(config.backbone, cache_dir)
        workspace = cls(config, clip, dataset, partition, (), held_out)
        workspace.views = tuple(
            open_feature_table(
                clip,
                dataset,
                cache_dir,
                workspace.method.needs,
                view=view,
                crop_scale=config.data.crop_scale,
                progress=progress,
            )
            for view in range(config.data.views)
        )
        return workspace

    def with_method(self, method_config: Any) -> Workspace:
        """The same data and backbone under another method."""
        config = replace(self.config, method=method_config)
        return Workspace(
            config,
            self.clip,
            self.dataset,
            self.partition,
            self.views,
            self.held_out,
        )

    def method_for(self, task: Task) -> Method:
        """This experiment's method for another class list; takes the same tensors."""
        if task not in self._methods:
            settings = self.config.method
            self._methods[task] = method_class(settings.name)(settings, self.clip, task)
        return self._methods[task]

    @cached_property
    def protocols(self) -> list[Protocol]:
        """What is measured besides the usual; each keeps what it has opened."""
        return open_protocols(self.config)

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
    def extras_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that clients receive besides; all are float32."""
        start = self.method.init_extras(self.config.seed)
        return {name: tuple(tensor.shape) for name, tensor in start.items()}

    @cached_property
    def tokens_per_client(self) -> int:
        """Positions that the method sends through both towers for one client and step."""
        seed, device = self.config.seed, self.clip.device
        extras = self.method.init_shared(seed) | self.method.init_extras(seed)
        private = self.method.init_private(seed, 0)
        before = self.clip.positions_encoded
        with torch.no_grad():
            encoded = self.method.encode(stack([extras], device), stack([private], device))
            once = self.clip.positions_encoded - before
            if self.views and len(self.dataset):
                one = self.views[0].rows(np.zeros(1, dtype=np.int64))
                self.method.logits(encoded, one.of_one().on(device))
        per_image = self.clip.positions_encoded - before - once
        return once + per_image * self.config.training.batch_size

    @property
    def step_bytes_per_client(self) -> int:
        """Bytes that one client's training step keeps for its gradient, roughly."""
        parts = self.clip.text
        return self.tokens_per_client * len(parts.blocks) * parts.width * KEPT_BYTES

    def train_data(self, client: int) -> ClientData:
        """A client's local training images and labels.

        Raises:
            UserError: it has no labelled images; the server does not ask such clients to train.
        """
        train = self.partition.train(client)
        if client in self.partition.unlabelled or not len(train):
            raise UserError(f"client {client} has no labelled training images and cannot train.")
        inputs = Inputs.cat([view.rows(train) for view in self.views])
        return ClientData(client, inputs, self._labels(train), views=len(self.views))

    def test_data(self, client: int) -> tuple[Inputs, Tensor]:
        """A client's local test images and labels (n,); n may be 0."""
        return self._rows(self.partition.test(client))

    def server_test(self) -> tuple[Inputs, Tensor]:
        """The server's test images and labels (n,)."""
        if self._server_test is None:
            self._server_test = self._rows(self.partition.server_test)
        return self._server_test

    def held_out_test(self) -> tuple[Inputs, Tensor]:
        """The images that a protocol holds out, and labels (n,) of its class list."""
        assert self.held_out is not None
        inputs = self.views[0].rows(self.held_out.index_N)
        return inputs, torch.from_numpy(self.held_out.labels_N)

    def start_private(self, client: int) -> Tensors:
        """A client's private tensors before it has ever trained."""
        start = self.method.init_private(self.config.seed, client)
        fills = type(self.method).init_private_from_data is not Method.init_private_from_data
        labelled = client not in self.partition.unlabelled and len(self.partition.train(client))
        if not (fills and labelled):
            return start
        return self.method.init_private_from_data(start, self.train_data(client), self.config.seed)

    def describe(self) -> dict[str, Any]:
        """Counts of clients x classes and domains, for `partition.json` and its plot."""
        return describe(self.dataset, self.partition)

    def _rows(self, index: NDArray[np.int64]) -> tuple[Inputs, Tensor]:
        return self.views[0].rows(index), self._labels(index)

    def _labels(self, index: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(self.dataset.labels_N[index])
