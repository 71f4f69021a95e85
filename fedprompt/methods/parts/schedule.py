"""Which images each client of a block sees in which local step.

Batches of unequal size are padded and masked. Clients are sorted by their number of steps; one that
has taken its last step leaves the block.

Shape suffixes: K clients, S steps, B images of a batch, N images of all clients, A clients that are
still training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.config.schema import TrainingConfig
from fedprompt.methods.batch import ClientData
from fedprompt.rng import generator, secret_generator


def local_steps(images: int, config: TrainingConfig) -> int:
    """Optimiser steps that a client takes in one round.

    Args:
        images: the number of its training images.
        config: the `training` section.
    """
    # Rounded up: with `drop_last`, a client smaller than a batch would never train.
    return config.local_epochs * math.ceil(images / config.batch_size)


@dataclass(frozen=True)
class Schedule:
    """The batches of a block.

    Attributes:
        index_SKB: rows among the images of all clients (N), of each step and client.
        second_SKB: rows of another view of the same images; the same rows for clients with one
            view.
        mask_SKB: True for images, False for padding, whose index is 0.
        segments: (first step, last step + 1, number of clients that take these steps), in order.
    """

    index_SKB: Tensor
    second_SKB: Tensor
    mask_SKB: Tensor
    segments: tuple[tuple[int, int, int], ...]


def draw_batches(
    data: Sequence[ClientData],
    config: TrainingConfig,
    seed: int,
    server_round: int,
    max_steps: int | None = None,
) -> Schedule:
    """Draw the batches of all clients and pad them to one shape.

    Args:
        data: per client, its images and labels, most steps first.
        config: batch size and epochs.
        seed: the experiment's seed.
        server_round: the round, counted from 1.
        max_steps: steps after which a client stops; None for all of its epochs.

    Returns:
        The schedule. The last batch of an epoch may be smaller than `config.batch_size`.
    """
    steps_K = [local_steps(len(d), config) for d in data]
    width = min(config.batch_size, max(len(d) for d in data))
    index = np.zeros((max(steps_K), len(data), width), dtype=np.int64)
    second = np.zeros_like(index)
    mask = np.zeros(index.shape, dtype=bool)
    offset = 0
    for k, client in enumerate(data):
        step, n = 0, len(client)
        for epoch in range(config.local_epochs):
            # The key names the client and not its place in the block, so that a client sees the
            # same batches in any block, on any worker, and after a resume.
            draw = generator(seed, "shuffle", server_round, client.client, epoch)
            images = draw.permutation(n) + offset
            view_n = other_n = np.zeros(n, dtype=np.int64)
            # Each image appears once per epoch, in a view drawn at random; views are n rows apart.
            if client.views > 1:
                key = (server_round, client.client, epoch)
                view_n = generator(seed, "view", *key).integers(client.views, size=n)
                # One of the other views, so that the two always differ.
                further_n = generator(seed, "second view", *key).integers(client.views - 1, size=n)
                other_n = (view_n + 1 + further_n) % client.views
            shuffled, others = images + n * view_n, images + n * other_n
            for begin in range(0, n, config.batch_size):
                part = slice(begin, begin + config.batch_size)
                size = len(shuffled[part])
                index[step, k, :size] = shuffled[part]
                second[step, k, :size] = others[part]
                mask[step, k, :size] = True
                step += 1
        offset += n * client.views
    return _scheduled(index, second, mask, steps_K, max_steps)


def draw_poisson(
    data: Sequence[ClientData],
    config: TrainingConfig,
    noise_seed: int | None,
    server_round: int,
    max_steps: int | None = None,
) -> Schedule:
    """Draw every image into every step with the same probability, independently and in secret.

    Who knew the draws would know in which steps an image can have left a trace, so they do not come
    from the experiment's seed.

    Args:
        data: per client, its images and labels, most steps first.
        config: batch size and epochs, from which the number of steps follows.
        noise_seed: fixes the draws, for tests; None takes them from the operating system.
        server_round: the round, counted from 1.
        max_steps: steps after which a client stops; None for all of its epochs.

    Returns:
        The schedule. A batch may be larger than `config.batch_size`, or empty; `expected_size` is
        the mean of its size.
    """
    steps_K = [local_steps(len(d), config) for d in data]
    drawn: list[list[tuple[NDArray[np.int64], NDArray[np.int64]]]] = []
    offset = 0
    for k, client in enumerate(data):
        n, views = len(client), client.views
        draw = secret_generator(noise_seed, "image sampling", server_round, client.client)
        steps = []
        for _ in range(steps_K[k]):
            chosen = np.flatnonzero(draw.random(n) < expected_size(n, config) / n)
            view = draw.integers(views, size=len(chosen))
            further = draw.integers(max(1, views - 1), size=len(chosen))
            other = (view + 1 + further) % views
            steps.append((chosen + offset + n * view, chosen + offset + n * other))
        drawn.append(steps)
        offset += n * views
    width = max(1, *(len(chosen) for steps in drawn for chosen, _ in steps))
    index = np.zeros((max(steps_K), len(data), width), dtype=np.int64)
    second = np.zeros_like(index)
    mask = np.zeros(index.shape, dtype=bool)
    for k, steps in enumerate(drawn):
        for step, (chosen, other) in enumerate(steps):
            index[step, k, : len(chosen)] = chosen
            second[step, k, : len(chosen)] = other
            mask[step, k, : len(chosen)] = True
    return _scheduled(index, second, mask, steps_K, max_steps)


def expected_size(images: int, config: TrainingConfig) -> float:
    """Mean number of images in a step of a client.

    Args:
        images: the number of its training images.
        config: the `training` section.
    """
    return images / math.ceil(images / config.batch_size)


def _scheduled(
    index: NDArray[np.int64],
    second: NDArray[np.int64],
    mask: NDArray[np.bool_],
    steps_K: list[int],
    max_steps: int | None,
) -> Schedule:
    if max_steps is not None:
        index, second, mask = index[:max_steps], second[:max_steps], mask[:max_steps]
        steps_K = [min(steps, max_steps) for steps in steps_K]
    segments, first = [], 0
    for stop in sorted(set(steps_K)):
        segments.append((first, stop, sum(s >= stop for s in steps_K)))
        first = stop
    index_SKB, second_SKB, mask_SKB = map(torch.from_numpy, (index, second, mask))
    return Schedule(index_SKB, second_SKB, mask_SKB, tuple(segments))
