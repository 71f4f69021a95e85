"""Opening what a participant of an experiment holds: data, partition, CLIP and features.

The server, every worker of a simulation, every node of a deployment and the commands that show a
partition open their data here, so all of them agree on which images each client holds.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import load_clip
from fedprompt.config.schema import BackboneConfig, Config, DataConfig
from fedprompt.data import open_dataset
from fedprompt.data.cache_files import default_cache_dir
from fedprompt.data.dataset import ImageDataset, withheld
from fedprompt.data.held_out import HeldOut
from fedprompt.data.partition import Partition, make_partition
from fedprompt.data.partition.copies import warn_of_copies
from fedprompt.errors import UserError
from fedprompt.evaluation.registry import hold_out
from fedprompt.experiment.architectures import refuse_architecture
from fedprompt.experiment.companions import with_companions
from fedprompt.workspace import Workspace

log = logging.getLogger(__name__)

MAX_OPEN_DATASETS = 8
"""How many data sets a `ResourceCache` keeps open. A sweep over seeds may need another split of the
same data set for each seed."""


class ResourceCache:
    """The frozen backbone and the data sets that several runs of one process share.

    Both are only read, so a run that shares them computes the same bits as a run that opens them
    itself. Files that change during the life of the process are not read again.
    """

    def __init__(self) -> None:
        self._clip: tuple[str, FrozenCLIP] | None = None
        self._datasets: OrderedDict[str, ImageDataset] = OrderedDict()

    def clip(self, config: BackboneConfig, cache_dir: Path) -> FrozenCLIP:
        """The backbone of a config; it is loaded unless the previous call asked for the same one.

        Args:
            config: the `backbone` section.
            cache_dir: folder for downloaded weights.

        Returns:
            The frozen CLIP. Only one is held: the previous one is released before another loads.

        Raises:
            UserError: the weights cannot be downloaded, read or loaded into the model.
        """
        key = f"{config!r} {cache_dir}"
        if self._clip is None or self._clip[0] != key:
            # Released before the next one is loaded, as two may not fit into the memory of a GPU.
            self._clip = None
            self._clip = key, load_clip(config, cache_dir)
        return self._clip[1]

    def dataset(self, config: DataConfig, seed: int, cache_dir: Path) -> ImageDataset:
        """The data set of a config and seed; it is opened unless it is among the last ones used.

        Args:
            config: the `data` section.
            seed: the experiment's seed, which decides on generated images and random splits.
            cache_dir: folder for downloaded files.

        Returns:
            The whole data set, before anything is held out of it.

        Raises:
            UserError: the data set cannot be found, downloaded or read.
        """
        key = f"{config!r} {seed} {cache_dir}"
        if key not in self._datasets:
            self._datasets[key] = open_dataset(config, seed, cache_dir)
        self._datasets.move_to_end(key)
        while len(self._datasets) > MAX_OPEN_DATASETS:
            self._datasets.popitem(last=False)
        return self._datasets[key]


def deal(config: Config, dataset: ImageDataset) -> tuple[ImageDataset, HeldOut | None, Partition]:
    """Hold out what an evaluation protocol asks for, and partition the rest among the clients.

    Args:
        config: the experiment.
        dataset: the whole data set.

    Returns:
        The data set that is partitioned, what was held out of it (None if no protocol asks for
        it), and the partition.

    Raises:
        UserError: the data set has too few classes, domains or images for the protocol or the
            partition.
    """
    dataset, held_out = hold_out(config, dataset)
    partition = make_partition(
        dataset,
        config.partition,
        config.seed,
        without_labels=config.trains_without_labels,
    )
    warn_of_copies(dataset, partition)
    return dataset, held_out, partition


def opener_for(config: Config, resources: ResourceCache) -> Callable[[Config], Workspace]:
    """The function that opens the workspace of an experiment in a worker of its simulation.

    Workers take over which images are readable, their labels and their hashes, instead of reading
    all images again, if the data set allows it.

    Args:
        config: the experiment.
        resources: holds the data set, if a workspace of this experiment was opened with it.

    Returns:
        A function that can be pickled.
    """
    dataset = resources.dataset(config.data, config.seed, default_cache_dir(config.output.cache))
    return partial(open_workspace, dataset=dataset) if dataset.portable else open_workspace


def open_workspace(
    config: Config,
    *,
    progress: bool = False,
    resources: ResourceCache | None = None,
    dataset: ImageDataset | None = None,
) -> Workspace:
    """Open what a participant of the experiment holds.

    Args:
        config: the experiment.
        progress: whether to show a bar while images that no cache holds are encoded.
        resources: keeps backbone and data sets open for the next workspace of this process.
        dataset: the whole data set, if another process has opened it.

    Returns:
        The workspace, with one feature table per view of `data.views`.

    Raises:
        UserError: weights or data cannot be found, downloaded or read, or do not fit the config.
    """
    resources = resources or ResourceCache()
    cache_dir = default_cache_dir(config.output.cache)
    refuse_architecture(config)
    # The cheap checks come first: an impossible partition is refused before weights are loaded and
    # images encoded.
    if dataset is None:
        dataset = resources.dataset(config.data, config.seed, cache_dir)
    dataset, held_out, partition = deal(config, dataset)
    readable_N = None
    if config.evaluation.withhold_tests:
        partition = partition.without_tests()
        readable_N = partition.held(len(dataset))
    clip = with_companions(resources.clip(config.backbone, cache_dir), config, cache_dir)
    shown = dataset if readable_N is None else withheld(dataset, readable_N)
    workspace = Workspace(config, clip, shown, partition, (), held_out)
    _check_domains(workspace)
    if workspace.method.reads_descriptions and config.data.descriptions is None:
        log.warning(
            "data.descriptions is not set: the data set's %d templates stand in for the sentences "
            "that method %s learns from.",
            len(workspace.task.templates), workspace.method.name,
        )  # fmt: skip
    if "second_view" in workspace.method.needs_to_train and config.data.views == 1:
        log.warning(
            "data.views is 1: method %s compares each image with itself and not with another view.",
            workspace.method.name,
        )
    workspace.open_images(dataset, readable_N, progress=progress)
    kinds = {config.backbone.kind_of(k): k for k in range(config.partition.clients)}
    for client in kinds.values() if config.backbone.differs else ():
        # Opened now, so that a library that is missing ends the run before its first round.
        workspace.of_client(client, dataset, progress=progress)
    return workspace


def _check_domains(workspace: Workspace) -> None:
    """Refuse a method whose numbers of domains are not those of the clients' images.

    With other partition schemes, clients stand for domains, whatever they hold.
    """
    told, options = workspace.method.domains, workspace.config.partition
    if told is None or not options.scheme.startswith("domain"):
        return
    if options.domain_clients != "equal":
        raise UserError(
            f"config: method {workspace.method.name} numbers the domains of clients in turn; set "
            "partition.domain_clients=equal."
        )
    names = workspace.dataset.domain_names
    if told != len(names):
        raise UserError(
            f"config: method.domains={told}, but clients hold {len(names)} domains "
            f"({', '.join(names)}); set method.domains={len(names)}."
        )
