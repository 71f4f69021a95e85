"""The images of an experiment that this process may read, and which client holds which."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.config.schema import Config
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.features.inputs import Inputs
from fedprompt.data.features.table import FeatureTable
from fedprompt.data.held_out import HeldOut
from fedprompt.data.partition import Partition, describe
from fedprompt.data.partition.queries import select
from fedprompt.errors import UserError
from fedprompt.methods.base import UNLABELLED, ClientData
from fedprompt.rng import generator


class HeldImages:
    """The images of an experiment, divided among the clients and the server.

    Args:
        config: the whole experiment.
        dataset: the images that are partitioned among the clients and the server's test set.
        partition: which of these images each client and the server hold.
        views: features of all images, one table per view of `data.views`. View 0 is the image
            without augmentation; all tests use this view.
        held_out: what an evaluation protocol has taken out of the data set, or None.
    """

    def __init__(
        self,
        config: Config,
        dataset: ImageDataset,
        partition: Partition,
        views: Sequence[FeatureTable],
        held_out: HeldOut | None = None,
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.partition = partition
        self.views = tuple(views)
        self.held_out = held_out

    @property
    def tested_columns(self) -> frozenset[str]:
        """What tests read of an image; see `Method.needs`."""
        raise NotImplementedError

    @property
    def num_clients(self) -> int:
        """Number of clients K; their ids are 0 .. K - 1."""
        return self.config.partition.clients

    @cached_property
    def trainable(self) -> list[int]:
        """Clients that the server may ask to train, ascending.

        They have training images, and labels of these unless the method learns without or they
        have pseudo-labels, and do not join late.
        """
        able = self.partition.able_to_train(self.config.trains_without_labels)
        return [client for client in able if client not in self.late]

    @cached_property
    def late(self) -> frozenset[int]:
        """Clients that join after the last round."""
        partition = self.config.partition
        # The head of one permutation: a larger `late_clients` only adds clients to the set.
        draw = generator(self.config.seed, "partition", "late").permutation(partition.clients)
        return frozenset(int(client) for client in draw[: partition.late_clients])

    @cached_property
    def possible_attackers(self) -> list[int]:
        """Clients among whom the attackers of a simulation are drawn, ascending.

        They are those that may train. One that holds no images is among them, so that the attackers
        are the same when the run is repeated without some of the images.
        """
        blind = set() if self.config.trains_without_labels else self.partition.unlabelled
        return [c for c in range(self.num_clients) if c not in self.late and c not in blind]

    @property
    def round_size(self) -> int:
        """Number of clients that train in a round in which all can be reached.

        The server and all nodes compute the same number, even if a node holds only its own images.
        """
        settings = self.config
        # Images with owners are spread over the nodes, so a node knows of no other's.
        able = len(self.trainable) if self.dataset.owners_N is None else settings.able_to_train
        # As `federation.sampling.draw_clients` does.
        return max(1, round(settings.federation.fraction * able))

    def train_data(
        self, client: int, asked_N: Tensor | None = None, pseudo_N: Tensor | None = None
    ) -> ClientData:
        """A client's local training images and labels.

        Args:
            client: client id, 0 .. K - 1.
            asked_N: in active learning, above 0 for images whose labels it has asked for; None if
                for none.
            pseudo_N: the labels that a client without labels has given its images, `UNLABELLED`
                for those that it leaves out; None if it has given none.

        Returns:
            Its n images in V views, (V * n, ...), all images of one view before the next view,
            and their labels (n,), `UNLABELLED` where they are not known. Only methods that learn
            without labels are given such images.

        Raises:
            UserError: the client has no images, or no labels and a method that needs them. The
                server does not ask such a client to train.
        """
        train = self.partition.train(client)
        known_N = self._known(client, asked_N, pseudo_N)
        if not self.trains(client, asked_N, pseudo_N):
            raise UserError(f"client {client} has no labelled training images and cannot train.")
        labels_N = self._labels(train) if pseudo_N is None else pseudo_N.clone()
        # Withheld here, so that no method can learn from them by mistake.
        labels_N[~torch.from_numpy(known_N)] = UNLABELLED
        if not self.config.method.learns_without_labels:
            train, labels_N = train[known_N], labels_N[torch.from_numpy(known_N)]
        inputs = Inputs.cat([view.rows(train) for view in self.views])
        return ClientData(client, inputs, labels_N, views=len(self.views))

    def test_data(self, client: int) -> tuple[Inputs, Tensor]:
        """A client's local test images (n, ...) and their labels (n,); n may be 0.

        Args:
            client: client id, 0 .. K - 1.
        """
        return self.images(self.partition.test(client))

    def validation_data(self, client: int) -> tuple[Inputs, Tensor]:
        """A client's local validation images (n, ...) and their labels (n,); n may be 0.

        Args:
            client: client id, 0 .. K - 1.
        """
        return self.images(self.partition.validation(client))

    @property
    def validates_locally(self) -> bool:
        """Whether clients measure on validation images of their own.

        It is the same in every process of an experiment, even where other clients' images are not
        known, so that all clients report the same metrics.
        """
        settings, partition = self.config.partition, self.partition
        return bool(settings.local_validation_fraction or len(partition.validation_flat))

    def server_validation(self) -> tuple[Inputs, Tensor]:
        """The server's validation images (n, ...) and their labels (n,); n may be 0."""
        return self._server_validation

    def server_test(self) -> tuple[Inputs, Tensor]:
        """The server's test images (n, ...) and their labels (n,)."""
        return self._server_test

    # Gathered once, since all of them are scored in every evaluated round; a memo knows them by
    # identity.

    @cached_property
    def _server_test(self) -> tuple[Inputs, Tensor]:
        return self.images(self.partition.server_test)

    @cached_property
    def _server_validation(self) -> tuple[Inputs, Tensor]:
        return self.images(self.partition.server_validation)

    @cached_property
    def _held_out_test(self) -> tuple[Inputs, Tensor]:
        assert self.held_out is not None
        inputs = self.views[0].rows(self.held_out.index_N, self.tested_columns)
        return inputs, torch.from_numpy(self.held_out.labels_N)

    def held_out_test(self) -> tuple[Inputs, Tensor]:
        """The held-out images (n, ...) and their labels (n,).

        After `hold_out_classes` the labels index the held-out class names, not the experiment's.
        """
        return self._held_out_test

    def describe(self) -> dict[str, Any]:
        """Counts of clients x classes and domains, for `partition.json` and its plot."""
        late = {"late_clients": sorted(self.late)} if self.late else {}
        return describe(self.dataset, self.partition) | late

    def trains(self, client: int, asked_N: Tensor | None, pseudo_N: Tensor | None = None) -> bool:
        """Whether a client has what the method learns from.

        Args:
            client: client id, 0 .. K - 1.
            asked_N: see `train_data`.
            pseudo_N: see `train_data`.
        """
        if self.config.method.learns_without_labels:
            return bool(len(self.partition.train(client)))
        return bool(self._known(client, asked_N, pseudo_N).any())

    def _known(
        self, client: int, asked_N: Tensor | None, pseudo_N: Tensor | None
    ) -> NDArray[np.bool_]:
        """Which of a client's training images have labels, known or chosen by itself, (n,)."""
        images = len(self.partition.train(client))
        if pseudo_N is not None:
            chosen_N: NDArray[np.bool_] = (pseudo_N != UNLABELLED).numpy()
            return chosen_N
        if client in self.partition.unlabelled:
            return np.zeros(images, dtype=bool)
        if not self.config.partition.labels_per_round:
            return np.ones(images, dtype=bool)
        asked = torch.zeros(images) if asked_N is None else asked_N
        known_N: NDArray[np.bool_] = (asked > 0).numpy()
        return known_N

    def ask(self, client: int, answers_NC: Tensor, asked_N: Tensor, active_round: int) -> Tensor:
        """Let a client ask for the labels of further training images.

        Args:
            client: client id, 0 .. K - 1.
            answers_NC: the model's probabilities for its n training images.
            asked_N: in which active round, from 1, each label was asked for; 0 for hidden ones.
            active_round: the present active round.

        Returns:
            A new `asked_N`.
        """
        train = self.partition.train(client)
        labels_N = np.where((asked_N > 0).numpy(), self.dataset.labels_N[train], UNLABELLED)
        rows = select(
            self.config.partition,
            self.views[0].rows(train, {"features"}).features.double().numpy(),
            answers_NC.double().numpy(),
            labels_N,
            generator(self.config.seed, "query", active_round, client),
        )
        asked_N = asked_N.clone()
        asked_N[torch.from_numpy(rows)] = active_round
        return asked_N

    def images(self, index: NDArray[np.int64]) -> tuple[Inputs, Tensor]:
        """Images of the data set as tests read them (n, ...), and their labels (n,).

        Args:
            index: indices of the images in the data set.
        """
        # What only training reads, such as local features of all patches, is left on disk.
        return self.views[0].rows(index, self.tested_columns), self._labels(index)

    def _labels(self, index: NDArray[np.int64]) -> Tensor:
        targets_NC = self.dataset.targets_NC
        if targets_NC is not None:
            return torch.from_numpy(targets_NC[index]).float()
        return torch.from_numpy(self.dataset.labels_N[index])
