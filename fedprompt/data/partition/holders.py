"""The `Partition` value: which images each client and the server hold.

Schemes and partition files produce it before the first round. Clients read their images from it,
and the server its test images.

Suffixes: N images, K clients, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedprompt.data.dataset import TEST, TRAIN, VAL
from fedprompt.data.partition.draws import Indices

SERVER, NOBODY = -1, -2
"""Values of `holder_N` for images that no client holds."""


@dataclass(frozen=True, eq=False)
class Partition:
    """Which images each client and the server hold.

    Indices point into the `ImageDataset` that was partitioned. They are stored compactly: client k
    has the images `flat[offsets[k]:offsets[k + 1]]`, in ascending order. No image is in two parts,
    so nothing that is chosen on validation images has seen a test image.

    Attributes:
        train_flat: training images of all clients.
        train_offsets: (K + 1,), start of each client's training images in `train_flat`, and the
            total at the end.
        test_flat: local test images of all clients.
        test_offsets: (K + 1,), likewise for `test_flat`.
        server_test: test images of the server.
        unlabelled: clients whose training images have no labels.
        validation_flat: local validation images of all clients: empty unless the config asks for
            them.
        validation_offsets: (K + 1,), likewise for `validation_flat`.
        server_validation: validation images of the server.

    Raises:
        ValueError: an image has more than one holder.
    """

    train_flat: Indices
    train_offsets: Indices
    test_flat: Indices
    test_offsets: Indices
    server_test: Indices
    unlabelled: frozenset[int]
    validation_flat: Indices
    validation_offsets: Indices
    server_validation: Indices

    def __post_init__(self) -> None:
        # Checked here and not in each scheme: a test image that is also a training image would
        # silently inflate the accuracies of a whole run.
        held = self._all_held()
        if len(np.unique(held)) < len(held):
            raise ValueError("an image is held twice")

    @classmethod
    def of_holders(
        cls,
        holder_N: Indices,
        part_N: NDArray[np.int8],
        clients: int,
        unlabelled: frozenset[int] = frozenset(),
    ) -> Partition:
        """Build a partition from the holder of each image.

        Args:
            holder_N: a client, `SERVER` or `NOBODY` for each image.
            part_N: `TRAIN`, `VAL` or `TEST` for each image; ignored where nobody holds it. The
                server has no training images: what it holds is `VAL` or counts as `TEST`.
            clients: number of clients K.
            unlabelled: clients whose training images have no labels.

        Returns:
            The partition; its arrays are read-only.
        """
        train = _group(holder_N, part_N == TRAIN, clients)
        test = _group(holder_N, part_N == TEST, clients)
        validation = _group(holder_N, part_N == VAL, clients)
        of_server = holder_N == SERVER
        server_test = np.flatnonzero(of_server & (part_N != VAL)).astype(np.int64)
        server_validation = np.flatnonzero(of_server & (part_N == VAL)).astype(np.int64)
        # `train` and `test` return views of these arrays; a caller must not be able to modify them.
        for array in (*train, *test, *validation, server_test, server_validation):
            array.flags.writeable = False
        return cls(*train, *test, server_test, unlabelled, *validation, server_validation)

    def without_tests(self) -> Partition:
        """The same partition, except that nobody holds a test image."""
        nothing = self.test_flat[:0]
        return replace(
            self,
            test_flat=nothing,
            test_offsets=np.zeros_like(self.test_offsets),
            server_test=self.server_test[:0],
        )

    def trained_on(self, train: Sequence[Indices]) -> Partition:
        """The same partition with other training images.

        Args:
            train: the training images of each client, without repetition. Local test images among
                them are no test images any more.

        Returns:
            The partition; its new arrays are read-only.
        """
        tests = [np.setdiff1d(self.test(k), own) for k, own in enumerate(train)]
        parts = [_joined([np.sort(own) for own in train]), _joined(tests)]
        (train_flat, train_offsets), (test_flat, test_offsets) = parts
        return replace(
            self,
            train_flat=train_flat,
            train_offsets=train_offsets,
            test_flat=test_flat,
            test_offsets=test_offsets,
        )

    def restricted(self, train_N: NDArray[np.bool_], tests_N: NDArray[np.bool_]) -> Partition:
        """The same partition without some of its images, which nobody holds then.

        Args:
            train_N: which images remain where they are training images.
            tests_N: which images remain where they are test or validation images.

        Returns:
            The partition; its arrays are read-only.
        """
        clients = range(self.num_clients)
        train = _joined([self.train(k)[train_N[self.train(k)]] for k in clients])
        test = _joined([self.test(k)[tests_N[self.test(k)]] for k in clients])
        validation = _joined([self.validation(k)[tests_N[self.validation(k)]] for k in clients])
        server = [own[tests_N[own]] for own in (self.server_test, self.server_validation)]
        for array in server:
            array.flags.writeable = False
        return Partition(*train, *test, server[0], self.unlabelled, *validation, server[1])

    @property
    def num_clients(self) -> int:
        """Number of clients K."""
        return len(self.train_offsets) - 1

    @property
    def trainable(self) -> list[int]:
        """Clients with labelled training images, ascending."""
        return self.able_to_train(without_labels=False)

    def able_to_train(self, without_labels: bool) -> list[int]:
        """Clients that can train, ascending.

        Args:
            without_labels: whether the method learns from training images without labels.
        """
        holding = np.flatnonzero(np.diff(self.train_offsets))
        return [int(k) for k in holding if without_labels or int(k) not in self.unlabelled]

    def train(self, client: int) -> Indices:
        """Return the indices of a client's local training images, ascending."""
        return self.train_flat[self.train_offsets[client] : self.train_offsets[client + 1]]

    def test(self, client: int) -> Indices:
        """Return the indices of a client's local test images, ascending; it trains on none."""
        return self.test_flat[self.test_offsets[client] : self.test_offsets[client + 1]]

    def validation(self, client: int) -> Indices:
        """Return the indices of a client's local validation images, ascending; often none."""
        first, end = self.validation_offsets[client : client + 2]
        return self.validation_flat[first:end]

    @property
    def has_validation(self) -> bool:
        """Whether anyone, a client or the server, holds validation images."""
        return bool(len(self.validation_flat) or len(self.server_validation))

    def held(self, images: int) -> NDArray[np.bool_]:
        """Which of N images a client or the server holds, (N,)."""
        held_N = np.zeros(images, dtype=bool)
        held_N[self._all_held()] = True
        return held_N

    def _all_held(self) -> Indices:
        """The images of all clients and of the server, part by part."""
        clients = (self.train_flat, self.validation_flat, self.test_flat)
        return np.concatenate((*clients, self.server_validation, self.server_test))

    def train_counts(self, labels_N: NDArray[np.int64], num_classes: int) -> Indices:
        """Count the local training images per client and class, (K, C)."""
        return count_values(self.train_flat, self.train_offsets, labels_N, num_classes)

    def test_counts(self, labels_N: NDArray[np.int64], num_classes: int) -> Indices:
        """Count the local test images per client and class, (K, C)."""
        return count_values(self.test_flat, self.test_offsets, labels_N, num_classes)

    def validation_counts(self, labels_N: NDArray[np.int64], num_classes: int) -> Indices:
        """Count the local validation images per client and class, (K, C)."""
        return count_values(self.validation_flat, self.validation_offsets, labels_N, num_classes)


def _group(holder_N: Indices, mask_N: NDArray[np.bool_], clients: int) -> tuple[Indices, Indices]:
    """Group the images in the mask that clients hold: (flat, offsets), as in `Partition`."""
    chosen = np.flatnonzero(mask_N & (holder_N >= 0)).astype(np.int64)
    # A stable sort keeps each client's images in ascending order.
    chosen = chosen[np.argsort(holder_N[chosen], kind="stable")]
    sizes_K = np.bincount(holder_N[chosen], minlength=clients)
    return chosen, np.concatenate(([0], np.cumsum(sizes_K))).astype(np.int64)


def _joined(parts: Sequence[Indices]) -> tuple[Indices, Indices]:
    """The images of all clients: (flat, offsets), as in `Partition`."""
    flat = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
    offsets = np.concatenate(([0], np.cumsum([len(part) for part in parts]))).astype(np.int64)
    flat.flags.writeable = offsets.flags.writeable = False
    return flat, offsets


def count_values(flat: Indices, offsets: Indices, values_N: Indices, num_values: int) -> Indices:
    """Count, for every client, how many of its images have each value.

    Args:
        flat: images of all clients, client by client, as in `Partition`.
        offsets: (K + 1,), where each client's images begin in `flat`.
        values_N: value of each image, such as its class or domain, from 0.
        num_values: number of possible values.

    Returns:
        (K, num_values).
    """
    clients = len(offsets) - 1
    # One bincount over combined (client, value) numbers instead of a loop over clients.
    client = np.repeat(np.arange(clients), np.diff(offsets))
    cells = np.bincount(client * num_values + values_N[flat], minlength=clients * num_values)
    return cells.reshape(clients, num_values).astype(np.int64)
