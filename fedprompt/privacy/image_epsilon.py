"""The epsilon that noise on the gradients of single images costs (`privacy.image_noise`).

THE GUARANTEE. Two runs are neighbours if one image of one client is missing in one of them: its
gradients count as zero, wherever it would have taken part. The noise multiplier is z =
`image_noise`, because one image changes a sum of gradients by at most `image_clip`. Replacing an
image by another one changes it by at most twice as much, so for that relation epsilon is that of
z / 2. Public, and thus not protected, are how many images each client has, who takes part in which
round, and whatever else the two runs have in common; the number of images is a client's weight in
the average, and decides its number of steps.

What is covered is everything that a client trains, its private tensors included, and so all that it
uploads, in all rounds together. It is covered against everybody, the server included. What is not
covered: numbers of correct answers that clients report in evaluation (`protocols: [global]` turns
that off), images per class that a node reports when it joins, and the other images: those of the
tests and of validation, and the server's own. Nor is what nobody uploads: the local-only baseline
of a simulation (its losses and accuracies) and the newcomers of `late_joiners` train without noise,
and AFL's personal models use a client's own sums as they are. An image that two clients hold, or
that one client holds twice, is two images.

WHAT A ROUND COSTS, for a client of n images and batches of B, with E = `local_epochs`:

shuffled   An image is in one step per epoch. Which one is known to all who know the seed, so no
           amplification by sampling is claimed: E Gaussian releases.
poisson    In each of the E m steps, m = ceil(n / B), an image takes part with probability 1 / m,
           which only the client draws and nobody else can repeat: E m releases of the Gaussian
           mechanism with Poisson sampling (Mironov, Talwar, Zhang, 2019, arXiv 1908.10530). With
           m = 1 every image is in every step.
sums       A method without steps (AFL) releases its noisy sums once.

Releases compose over rounds, those that a resumed run has repeated included, and `epsilon` is that
of the client for which it is largest. There is no defence against floating-point attacks on the
noise (Mironov, CCS 2012).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

from fedprompt.config.protection import PrivacyConfig
from fedprompt.config.schema import TrainingConfig
from fedprompt.privacy.accountant import sampled_epsilon

Event = tuple[float, int]
"""Noise multiplier, and m of a Poisson sampling with probability 1 / m."""


def round_releases(
    privacy: PrivacyConfig, training: TrainingConfig, images: int, *, steps: bool
) -> tuple[Event, int]:
    """What one round of one client releases.

    Args:
        privacy: noise and sampling.
        training: batch size and epochs.
        images: the number of the client's training images.
        steps: whether the method takes steps, or uploads sums over the images.

    Returns:
        The kind of release, and how many of them.
    """
    noise = privacy.image_noise
    if not steps:
        return (noise, 1), 1
    if privacy.image_sampling == "shuffled":
        return (noise, 1), training.local_epochs
    batches = math.ceil(images / training.batch_size)
    return (noise, batches), training.local_epochs * batches


def image_epsilon(
    privacy: PrivacyConfig,
    training: TrainingConfig,
    rounds: Mapping[int, int],
    images: Callable[[int], int],
    *,
    steps: bool,
) -> float | None:
    """The largest epsilon of any image.

    Args:
        privacy: noise, sampling and delta.
        training: batch size and epochs.
        rounds: in how many rounds a client was asked to train, by client id.
        images: from a client id to the number of its training images.
        steps: as in `round_releases`.

    Returns:
        Epsilon, or None if it is infinite because there is no noise.

    Raises:
        UserError: the accountant is not installed.
    """
    most: dict[Event, int] = {}
    for client, times in rounds.items():
        event, count = round_releases(privacy, training, images(client), steps=steps)
        most[event] = max(most.get(event, 0), times * count)
    found = [_epsilon(event, count, privacy.delta) for event, count in most.items()]
    # Without a client there is no release; the accountant is needed all the same.
    found.append(sampled_epsilon({(privacy.image_noise, 1): 0}, privacy.delta))
    known = [value for value in found if value is not None]
    return max(known) if len(known) == len(found) else None


@lru_cache(maxsize=4096)
def _epsilon(event: Event, count: int, delta: float) -> float | None:
    return sampled_epsilon({event: count}, delta)
