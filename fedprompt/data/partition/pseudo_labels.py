"""Pseudo-labels: which unlabelled images a client trains on, and as what.

With `partition.relabel_every`, a client without labels (`partition.unlabelled_clients`) trains as
well. At the start of every phase of so many rounds, the present model guesses the classes of its
training images, and the most confident guesses are labels until the next phase. Any method that
learns from labels can be trained in this way: it is given these images and labels as if the client
had no others.

Source: Cooperative Pseudo Labeling for Unsupervised Federated Classification (FedCoPL, Guo et al.,
ICCV 2025, arXiv 2510.10100; public code krumpguo/FedCoPL at ed7e0e0, methods/main_UL.py and
methods/unsupervised_learning_new/fedcopl.py). A zero-shot CLIP favours some classes, and each
client would learn that bias. So the clients agree on how many images each class gets:

1. Zero-shot CLIP (first phase) or the client's present model (later) gives every image a class and
   a probability p. A guess is sure if p is above the client's q-quantile of p and its entropy is
   below the (1 - q)-quantile of the entropies (q = `partition.unsure_share`).
2. Each client reports how many of its sure guesses are of class c: n_kc. The server sums them to
   N_c, and T = ceil(sum_c N_c / C) images of each class are to be learned from, by all clients
   together.
3. A client's quota of class c is q_kc = ceil(T n_kc / N_c), its share of them. Where nobody is sure
   (N_c = 0), it is ceil(phase * images / (4 C K)), with the images of all K clients.
4. The client keeps the q_kc most confident ones of all its guesses of class c, sure or not.

How we differ: the server sends the totals N_c to everybody, and clients compute quotas from their
own counts; the numbers are the same. Quotas are whole-number arithmetic, where the code's float32
rounds some of them up by one. Probabilities are float64, where float32 makes many of them 1 and
their order that of the images. A client whose quotas leave it no image trains on its most confident
one, where the code divides by zero. The code also sums prototypes of classes that nothing reads; we
leave them out.

The state is two private tensors per client. They are stored beside the private tensors of the
method and never uploaded.

Suffixes: N images of a client, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedprompt.config.schema import Config
from fedprompt.data.dataset import UNLABELLED
from fedprompt.data.partition.queries import OF_LABELS
from fedprompt.errors import UserError

GUESSES, PHASE = f"{OF_LABELS}guesses", f"{OF_LABELS}phase"
"""Names of the state in a store of private tensors."""
Floats = NDArray[np.float64]
Whole = NDArray[np.int64]


@dataclass(frozen=True)
class Guesses:
    """What a model thinks of a client's images.

    Attributes:
        classes_N: the most probable class of each image.
        place_N: place of each image in the order of falling probability, from 0.
        sure_N: whether the guess is sure.
    """

    classes_N: Whole
    place_N: Whole
    sure_N: NDArray[np.bool_]

    @classmethod
    def of(cls, logits_NC: Floats, unsure_share: float) -> Guesses:
        """The guesses of a model.

        Args:
            logits_NC: its logits for the client's images, at least one.
            unsure_share: the share q of images, in [0, 1), that are not sure of their class.
        """
        shifted_NC = logits_NC - logits_NC.max(1, keepdims=True)
        log_p_NC = shifted_NC - np.log(np.exp(shifted_NC).sum(1, keepdims=True))
        p_NC = np.exp(log_p_NC)
        top_N, entropy_N = p_NC.max(1), -(p_NC * log_p_NC).sum(1)
        sure_N = (top_N > np.quantile(top_N, unsure_share)) & (
            entropy_N < np.quantile(entropy_N, 1 - unsure_share)
        )
        # Equally probable ones keep the order of the images.
        place_N = np.empty(len(top_N), dtype=np.int64)
        place_N[np.argsort(-top_N, kind="stable")] = np.arange(len(top_N))
        return cls(p_NC.argmax(1), place_N, sure_N)

    def counts(self, classes: int) -> tuple[Whole, Whole]:
        """Images by guessed class (C,): of sure guesses, n_kc, and of all guesses."""
        sure_C = np.bincount(self.classes_N[self.sure_N], minlength=classes)
        return sure_C, np.bincount(self.classes_N, minlength=classes)

    def chosen(self, quota_C: Whole) -> Whole:
        """The labels (N,) to train on, `UNLABELLED` for images that are left out.

        Args:
            quota_C: the largest number of images of each class.

        Returns:
            Labels of `images_chosen` images.
        """
        labels_N = np.full(len(self.classes_N), UNLABELLED, dtype=np.int64)
        for c in np.unique(self.classes_N):
            rows = np.flatnonzero(self.classes_N == c)
            labels_N[rows[np.argsort(self.place_N[rows])][: quota_C[c]]] = c
        if (labels_N == UNLABELLED).all():
            best = self.place_N.argmin()
            labels_N[best] = self.classes_N[best]
        return labels_N

    def table(self) -> NDArray[np.float32]:
        """The guesses as they are stored, (N, 3)."""
        return np.stack([self.classes_N, self.place_N, self.sure_N], axis=1).astype(np.float32)

    @classmethod
    def read(cls, table_N3: NDArray[np.float32]) -> Guesses:
        """The guesses that `table` returned."""
        classes_N, place_N, sure_N = table_N3.astype(np.int64).T
        return cls(classes_N, place_N, sure_N > 0)


@dataclass(frozen=True)
class Totals:
    """What all clients without labels have counted together in a phase.

    Attributes:
        phase: the phase, from 1.
        sure_C: N_c, sure guesses of each class.
        images: images of all these clients.
        clients: how many clients there are, K.
    """

    phase: int
    sure_C: tuple[int, ...]
    images: int
    clients: int

    @property
    def per_class(self) -> int:
        """T: how many images of each class are to be learned from."""
        return -(-sum(self.sure_C) // len(self.sure_C))

    def quota(self, own_C: Whole) -> Whole:
        """A client's quotas q_kc (C,), from its own counts n_kc."""
        # Of a class that nobody is sure of, everyone gets as many, and more in later phases.
        unknown = -(-self.phase * self.images // (4 * len(self.sure_C) * self.clients))
        pairs = zip(own_C.tolist(), self.sure_C, strict=True)
        quota = [-(-self.per_class * n // total) if total else unknown for n, total in pairs]
        return np.array(quota, dtype=np.int64)


def images_chosen(quota_C: Whole, guessed_C: Whole) -> int:
    """How many images a client trains on.

    Args:
        quota_C: its quotas.
        guessed_C: its images by guessed class.
    """
    return max(1, int(np.minimum(quota_C, guessed_C).sum()))


def check_pseudo_labels(config: Config) -> None:
    """Refuse what cannot be combined with pseudo-labels.

    Args:
        config: the experiment; some of its clients have no labels, and are to have pseudo-labels.

    Raises:
        UserError: it names the key.
    """
    secure, kind = config.secure_aggregation.enabled, config.attack.kind
    train_on_labels = {"late_joiners", "privacy_audit", "unlearning"} & set(config.protocols)
    clashes = {
        "secure_aggregation.enabled, since the server sees counts by class": secure,
        "privacy.noise, since counts by class have none": config.privacy.noise > 0,
        "privacy.image_noise, since counts by class have none": config.privacy.image_noise > 0,
        # Its sensitivity is that of one reply, but a client's counts change the others' quotas.
        "strategy.name=dp_fedavg, since a client's counts change what the others train on": (
            config.strategy.name == "dp_fedavg"
        ),
        "asynchronous.enabled, since all clients label their images at once": (
            config.asynchronous.enabled
        ),
        f"data.source={config.data.source}, where an image has several labels": (
            config.data.multi_label
        ),
        "partition.sessions": config.partition.sessions > 0,
        "partition.labels_per_round": config.partition.labels_per_round > 0,
        f"attack.kind={kind}, which changes labels": kind in ("label_flip", "backdoor"),
        f"method.name={config.method.name}, which learns from images without labels as it is": (
            config.method.learns_without_labels
        ),
        f"protocol {min(train_on_labels, default='')}": bool(train_on_labels),
    }
    for what in (name for name, there in clashes.items() if there):
        raise UserError(
            f"config: clients without labels train on pseudo-labels (partition.relabel_every="
            f"{config.relabel_every}), which cannot be combined with {what}; leave it out, or set "
            "partition.relabel_every=0."
        )
