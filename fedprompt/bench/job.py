"""A whole experiment as a job: its sizes, and how often each implementation does which work.

The counts are exact, so that the time of an experiment that the reference would need many hours for
can be computed from measured pieces (`pieces.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.bench.class_lists import class_names
from fedprompt.bench.compare import Row
from fedprompt.bench.workload import LEARNING_RATE, Sizes, make_workspace
from fedprompt.workspace import Workspace


@dataclass(frozen=True)
class Piece:
    """Work that is repeated: who does it (`ours` or `reference`), what it is, images of a batch."""

    path: str
    what: str
    images: int = 0

    @property
    def name(self) -> str:
        """The piece in words."""
        return f"{self.path}: {self.what}" + (f" of {self.images} images" if self.images else "")


Counts = dict[Piece, float]


@dataclass(frozen=True)
class Job:
    """One experiment; the reference encodes test images in batches of `test_batch`."""

    classes: int
    sizes: Sizes
    rounds: int
    context: int = 4
    batch: int = 8
    test_batch: int = 100

    def workspace(self, clip: FrozenCLIP, features_ND: Tensor | None = None) -> Workspace:
        """The job's workspace; random features where none are given."""
        return make_workspace(
            clip,
            class_names(self.classes),
            self.sizes,
            features_ND,
            method={"name": "promptfl", "context_tokens": self.context},
            training={"batch_size": self.batch, "lr": LEARNING_RATE / 10},
            federation={"rounds": self.rounds},
        )

    @property
    def title(self) -> str:
        """The job in words."""
        sizes = self.sizes
        return (
            f"{self.classes} classes, {sizes.clients} clients x {sizes.train} images, "
            f"{self.rounds} rounds"
        )

    def reference_counts(self) -> Counts:
        """How often the reference copies the model, trains a step and tests a batch."""
        sizes, counts = self.sizes, Counter[Piece]()
        counts[Piece("reference", "copy")] = self.rounds * sizes.clients
        jobs = (
            ("step", sizes.train, self.batch, self.rounds * sizes.clients),
            ("test", sizes.test, self.test_batch, (self.rounds + 1) * sizes.clients),
            ("test", sizes.server_test, self.test_batch, self.rounds + 1),
        )
        for kind, images, at_once, times in jobs:
            # A last, smaller batch does not cost the same, so it is counted separately.
            full, rest = divmod(images, at_once)
            counts[Piece("reference", kind, at_once)] += full * times
            counts[Piece("reference", kind, rest)] += times if rest else 0
        return {piece: float(times) for piece, times in counts.items() if times}

    def our_counts(self) -> Counts:
        """How often ours encodes a batch, trains and evaluates a round, and only evaluates."""
        at_once = 2 * self.batch
        batches = self.sizes.images / at_once
        return {
            Piece("ours", "encoding", at_once): batches,
            Piece("ours", "round"): float(self.rounds),
            Piece("ours", "evaluation"): 1.0,
        }


SMALL = Job(classes=10, sizes=Sizes(10, train=8, test=2, server_test=20), rounds=6)


def few_shot_job(clients: int, *, classes: int, shots: int, tests: int, rounds: int) -> Job:
    """A few-shot experiment, about the size of Caltech-101 with the command's defaults.

    Caltech-101, as CoOp splits it, has 2,465 test images in 100 classes.

    Args:
        clients: number of clients; training images are distributed among them.
        classes: number of classes.
        shots: training images per class, all clients together.
        tests: test images per class on the server, and again on all clients together.
        rounds: number of rounds.
    """
    train, test = max(1, classes * shots // clients), max(1, classes * tests // clients)
    return Job(classes, Sizes(clients, train, test, classes * tests), rounds)


def total(counts: Mapping[Piece, float], each: Mapping[Piece, float]) -> float:
    """The sum over all pieces of their number times the cost of each."""
    return sum(times * each[piece] for piece, times in counts.items())


def counted(ratio: float, ours_gflop: float, reference_gflop: float) -> Row:
    """Compare a measured ratio of times with the ratio of counted operations.

    Args:
        ratio: the reference's time divided by ours.
        ours_gflop: counted operations of our implementation, in 10^9.
        reference_gflop: those of the reference.

    Returns:
        Values for a row: both counts, the ratio that they would give if both implementations ran
        equally well, and the share of it that was reached.
    """
    possible = reference_gflop / ours_gflop
    return {
        "ours_gflop": ours_gflop,
        "reference_gflop": reference_gflop,
        "counted_ratio": possible,
        "share_of_saving": ratio / possible,
    }
