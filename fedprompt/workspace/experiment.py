"""What a participant of an experiment holds: frozen CLIP, image features, partition and method.

The server, every worker of a simulation and every node of a deployment have a workspace of their
own, which `fedprompt.experiment.workspaces` opens from the config. Local training, scoring and the
evaluation protocols read their images and their method from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.compression import Compression
from fedprompt.backbone.loading import load_clip
from fedprompt.backbone.memo import Memo
from fedprompt.backbone.sample import same_text_tower
from fedprompt.config.schema import BackboneConfig, Config, TrainingConfig
from fedprompt.data.cache_files import default_cache_dir
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.descriptions import load_descriptions
from fedprompt.data.features.table import FeatureTable
from fedprompt.data.features.views import open_views
from fedprompt.data.held_out import HeldOut
from fedprompt.data.partition import Partition
from fedprompt.data.partition.sessions import in_session
from fedprompt.data.partition.stages import stage_of
from fedprompt.data.sections import resolve_group
from fedprompt.errors import UserError
from fedprompt.methods.base import Method, Task, Tensors, stack
from fedprompt.methods.parts.step_graphs import StepGraphs
from fedprompt.methods.registry import method_class
from fedprompt.runtime.step_recorder import step_recorder
from fedprompt.workspace.images import HeldImages


class Workspace(HeldImages):
    """The frozen side of an experiment: opened once per process, and only read afterwards.

    The server and the simulated clients of a process use the same workspace. On a node of a
    deployment it holds the images of that node's client alone. Nothing that training changes is
    stored here but for the `memo`, which holds results of shared tensors only, and the buffers of
    `graphs`; so private tensors cannot leak from one client to another through it.

    Args:
        config: the whole experiment.
        clip: the frozen backbone.
        dataset: the images that are partitioned among the clients and the server's test set.
        partition: which of these images each client and the server hold.
        views: features of all images, one table per view of `data.views`. View 0 is the image
            without augmentation; all tests use this view.
        held_out: what an evaluation protocol has taken out of the data set, or None.

    Attributes:
        memo: what has been computed from the shared tensors that are evaluated now.
        graphs: recordings of local steps, if `backbone.cuda_graphs` asks for them and the backbone
            is on a GPU that can. Whatever their buffers hold is written over before it is read.

    Raises:
        UserError: the method does not fit the backbone or the class names.
    """

    def __init__(
        self,
        config: Config,
        clip: FrozenCLIP,
        dataset: ImageDataset,
        partition: Partition,
        views: Sequence[FeatureTable],
        held_out: HeldOut | None = None,
    ) -> None:
        super().__init__(config, dataset, partition, views, held_out)
        self.clip = clip
        self.task = Task(
            dataset.class_names,
            tuple(config.data.templates),
            # Those of held-out classes are checked now, and not after training.
            load_descriptions(
                config.data.descriptions,
                (*dataset.class_names, *(held_out.class_names if held_out else ())),
            ),
            None if dataset.targets_NC is None else config.multi_label,
        )
        self.method: Method = method_class(config.method.name)(config.method, clip, self.task)
        # `method_for` adds the methods for other class names.
        self._methods = {self.task: self.method}
        self._others: dict[str, Workspace] = {}
        self._session: tuple[int, Workspace] | None = None
        self.memo = Memo()
        recorder = step_recorder(clip.device, config.backbone.cuda_graphs)
        self.graphs = None if recorder is None else StepGraphs(self.method, recorder)

    def with_method(self, method_config: Any, training: TrainingConfig | None = None) -> Workspace:
        """A workspace with the same data and backbone and another method, such as a baseline.

        Args:
            method_config: the `method` section, an instance of the method's `Config`.
            training: its `training` section; None keeps this workspace's.

        Returns:
            A new workspace, which shares the backbone, the data and the feature tables.

        Raises:
            UserError: the method does not fit the backbone or the class names.
        """
        config = replace(
            self.config, method=method_config, training=training or self.config.training
        )
        return Workspace(
            config,
            self.clip,
            self.dataset,
            self.partition,
            self.views,
            self.held_out,
        )

    def with_partition(self, partition: Partition) -> Workspace:
        """A workspace with the same data, backbone and method, divided differently among clients.

        Args:
            partition: which images each client and the server hold.

        Returns:
            A new workspace, which shares the backbone, the data and the feature tables.
        """
        return Workspace(self.config, self.clip, self.dataset, partition, self.views, self.held_out)

    @property
    def tested_columns(self) -> frozenset[str]:
        """What tests read of an image: what the method does."""
        return self.method.needs

    @property
    def columns(self) -> frozenset[str]:
        """What feature tables hold: what the method reads of an image, and what attackers do."""
        attackers = {"pixels"} if self.config.attack.kind == "backdoor" else set()
        return self.method.needs | self.method.needs_to_train | attackers

    def open_images(
        self,
        dataset: ImageDataset,
        readable_N: NDArray[np.bool_] | None = None,
        *,
        progress: bool = False,
    ) -> None:
        """Open the feature tables, whose columns only a workspace with its method can tell.

        Args:
            dataset: the images to encode.
            readable_N: which of them may be read; None for all. Their features are in one file, so
                the table itself refuses the others.
            progress: whether to show a bar while images that no cache holds are encoded.

        Raises:
            UserError: as `open_views`.
        """
        opened = open_views(
            self.clip,
            dataset,
            self.config.data,
            default_cache_dir(self.config.output.cache),
            self.columns,
            self.method.teacher,
            routing=self.method.routing,
            progress=progress,
        )
        self.views = tuple(replace(view, readable_N=readable_N) for view in opened)

    def in_form(
        self,
        compression: Compression,
        dataset: ImageDataset | None = None,
        *,
        progress: bool = False,
    ) -> Workspace:
        """The same experiment through the same backbone with its weights kept otherwise.

        Args:
            compression: how they are kept.
            dataset: the images to encode; None for those of this workspace.
            progress: whether to show a bar while images that no cache holds are encoded.

        Returns:
            This workspace if its weights are kept so, otherwise another one, which is opened once.

        Raises:
            UserError: a library is missing, or the weights or features cannot be read.
        """
        backbone = replace(
            self.config.backbone,
            weights=compression.weights,
            pruned=compression.pruned,
            client_weights=[],
            client_models=[],
        )
        return self._through(backbone, dataset, progress=progress)

    def of_client(
        self,
        client: int,
        dataset: ImageDataset | None = None,
        *,
        progress: bool = False,
    ) -> Workspace:
        """The workspace with a client's backbone, of `client_models` and `client_weights`.

        Args:
            client: the client's number.
            dataset: as in `in_form`.
            progress: as in `in_form`.

        Raises:
            UserError: as in `in_form`, or the text tower is another one.
        """
        own = self.config.backbone
        changed: dict[str, Any] = {
            "weights": own.weights_of(client), "client_weights": [], "client_models": []
        }  # fmt: skip
        if own.client_models:
            name = own.client_models[client % len(own.client_models)]
            keys = resolve_group("backbone", name)
            changed |= {key: keys.get(key) for key in ("model", "pretrained", "checkpoint")}
        return self._through(replace(own, **changed), dataset, progress=progress)

    def _through(
        self, backbone: BackboneConfig, dataset: ImageDataset | None, *, progress: bool
    ) -> Workspace:
        """This experiment through another backbone, which is opened once."""
        own = replace(self.config.backbone, client_weights=[], client_models=[])
        if backbone == own:
            return self
        key = repr(backbone)
        if key in self._others:
            return self._others[key]
        config = replace(self.config, backbone=backbone)
        cache_dir = default_cache_dir(config.output.cache)
        if key not in self.clip.others:
            self.clip.others[key] = load_clip(backbone, cache_dir)
        clip = self.clip.others[key]
        if backbone.model != own.model and not same_text_tower(clip, self.clip):
            raise UserError(
                f"backbone.client_models: {clip.name} has another text tower than "
                f"{self.clip.name}, so the same prompt means something else there; the models of "
                "one federation may differ in their image towers only."
            )
        # What the method reads beside the backbone is the same, whoever holds the backbone how.
        clip.companions = self.clip.companions
        other = Workspace(config, clip, self.dataset, self.partition, (), self.held_out)
        readable_N = self.views[0].readable_N
        other.open_images(dataset or self.dataset, readable_N, progress=progress)
        self._others[key] = other
        return other

    def at(self, server_round: int) -> Workspace:
        """What there is in a round of a class-incremental run (`partition.sessions`).

        Args:
            server_round: the round, from 0.

        Returns:
            A workspace with the images and the class names of the round's session, which shares
            the backbone and the feature tables; in any other run, this workspace.

        Raises:
            UserError: the classes cannot be divided, or no client can train in the session.
        """
        if not self.config.partition.sessions:
            return self
        # Round 0 tests what training then starts from.
        session = stage_of(self.config, max(1, server_round)).number
        # Only the present one is kept, since each has a method and images of its own.
        if self._session is None or self._session[0] != session:
            options, seed = self.config.partition, self.config.seed
            seen = in_session(options, self.dataset, self.partition, session, seed)
            config = replace(self.config, partition=replace(options, sessions=0))
            self._session = session, Workspace(config, self.clip, *seen, self.views, self.held_out)
        return self._session[1]

    def method_for(self, task: Task) -> Method:
        """The experiment's method for other class names, for example those of a held-out split.

        Args:
            task: class names and templates.

        Returns:
            A method that accepts the prompt tensors of `self.method`. It is created only once per
            task, since the class names must be tokenised and embedded.

        Raises:
            UserError: the method does not fit the class names.
        """
        if task not in self._methods:
            settings = self.config.method
            self._methods[task] = method_class(settings.name)(settings, self.clip, task)
        return self._methods[task]

    @cached_property
    def shared_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the method shares; all are float32.

        Both sides check the messages that they receive against these shapes.
        """
        start = self.method.init_shared(self.config.seed)
        return {name: tuple(tensor.shape) for name, tensor in start.items()}

    @cached_property
    def extras_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that clients receive beside the shared ones.

        All of them are float32.
        """
        start = self.method.init_extras(self.config.seed)
        return {name: tuple(tensor.shape) for name, tensor in start.items()}

    @property
    def tokens_per_client(self) -> int:
        """Token positions that both towers process in one training step of one client.

        Together with the memory (`simulation/step_memory.py`) it decides how many clients train in
        one block.
        """
        per_step, per_image = self._positions
        return per_step + per_image * self.config.training.batch_size

    @property
    def prompt_tokens_per_client(self) -> int:
        """Token positions that encode one client's prompts, whatever the number of images."""
        return self._positions[0]

    @cached_property
    def _positions(self) -> tuple[int, int]:
        """Token positions of `encode`, and of `logits` for one image."""
        seed, device = self.config.seed, self.clip.device
        received = self.method.init_shared(seed) | self.method.init_extras(seed)
        private = self.method.init_private(seed, 0)
        # Measured on one image, since only the method knows which of its inputs pass through a
        # tower: CLIP counts the positions.
        before = self.clip.positions_encoded
        with torch.no_grad():
            encoded = self.method.encode(stack([received], device), stack([private], device))
            per_step = self.clip.positions_encoded - before
            # Any image that is held; tests may be withheld from this process.
            first = np.flatnonzero(self.partition.held(len(self.dataset)))[:1]
            if self.views and len(first):
                image = self.views[0].rows(first)
                self.method.logits(encoded, image.of_one().on(device))
        per_image = self.clip.positions_encoded - before - per_step
        # The trial is no work of the run.
        self.clip.positions_encoded = before
        return per_step, per_image

    def start_private(
        self, client: int, asked_N: Tensor | None = None, pseudo_N: Tensor | None = None
    ) -> Tensors:
        """A client's private tensors before its first training.

        Methods that initialise them from the client's images (`init_private_from_data`) do so
        here. A client that cannot train keeps the values of `init_private`.

        Args:
            client: client id, 0 .. K - 1.
            asked_N: see `train_data`.
            pseudo_N: see `train_data`.

        Returns:
            The private tensors by name, without a client axis.
        """
        start = self.method.init_private(self.config.seed, client)
        fills = type(self.method).init_private_from_data is not Method.init_private_from_data
        # `train_data` copies all of a client's images, which most methods would not look at.
        if not (fills and self.trains(client, asked_N, pseudo_N)):
            return start
        data = self.train_data(client, asked_N, pseudo_N)
        return self.method.init_private_from_data(start, data, self.config.seed)


def check_private(method: Method, stored: Tensors, seed: int) -> None:
    """Refuse private tensors that the method cannot read.

    Args:
        method: the method.
        stored: private tensors of one client, without momentum.
        seed: the experiment's seed.

    Raises:
        UserError: they are not those of the method, for example because another version of it
            has written them.
    """
    expected = method.init_private(seed, 0)
    if set(stored) == set(expected):
        return
    raise UserError(
        f"the stored private tensors are {sorted(stored)}, but method '{method.name}' has "
        f"{sorted(expected)}; another version of fedprompt has written them. Read them with that "
        "version, or start a new run."
    )
