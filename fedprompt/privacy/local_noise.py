"""Noise that a client adds before it sends its update: client-level local differential privacy.

Runs on the client, in `federation.client_app`, after local training and before the reply is built.

Source: the Gaussian mechanism (Dwork and Roth, 2014, theorem A.1) on a client's clipped change, as
in Geyer, Klein and Nabi (2017, arXiv 1712.07557), but on the client, which sends
    received + Delta min(1, S / |Delta|) + N(0, z^2 S^2 I),
with the norm over all shared tensors together. Any two clipped changes differ by at most 2 S, so
one round costs as much as a Gaussian release with noise multiplier z / 2. A client pays for every
round, and once more for a round that a resumed run repeats, because its noise is then new; the
server records what it asks for before it asks (releases.py). A change that is not finite is
replaced by zero, because a reply without noise would show what has happened. A noisy reply contains
nothing else: no losses, and a number of images of 1, so that all clients have the same weight.

What is covered: the shared tensors of a reply, against everybody, the server included. What is not
covered: the accuracy of personal models, which clients still report (`protocols: [global]` turns
that off).

The noise comes from the operating system, so that nobody can subtract it, and two runs differ.
`privacy.noise_seed` makes it reproducible, for tests.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedprompt.config.protection import PrivacyConfig
from fedprompt.methods.base import Tensors
from fedprompt.privacy.accountant import epsilon
from fedprompt.rng import secret_generator

log = logging.getLogger("fedprompt.client")


def protected(
    received: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    config: PrivacyConfig,
    *,
    server_round: int,
    client: int,
) -> Tensors:
    """The shared tensors that a client sends in place of its trained ones.

    Args:
        received: shared tensors as the server sent them, by name.
        trained: the same tensors after training.
        config: clip S, noise multiplier z and, for tests, the seed of the noise.
        server_round: the round; it keys the noise if there is a seed.
        client: the client's id; it keys the noise if there is a seed.

    Returns:
        Tensors with the names and shapes of `trained`, float32, on the CPU.
    """
    change = {n: t.double().cpu() - received[n].double().cpu() for n, t in trained.items()}
    norm = float(torch.sqrt(sum((c.square().sum() for c in change.values()), torch.zeros(()))))
    if not math.isfinite(norm):
        log.warning("client %d: the change is not finite; only noise is sent", client)
        change, norm = {n: torch.zeros_like(c) for n, c in change.items()}, 0.0
    # One factor for all tensors: clipping each of them would allow a longer change.
    factor = min(1.0, config.clip / norm) if norm > 0 else 1.0
    draw = secret_generator(config.noise_seed, "local noise", server_round, client)
    sent = {}
    # Sorted by name, so that a fixed seed gives every tensor the same noise in every process.
    for name, values in sorted(change.items()):
        noise = torch.from_numpy(np.asarray(draw.standard_normal(tuple(values.shape))))
        noisy = factor * values + config.noise * config.clip * noise
        sent[name] = (received[name].double().cpu() + noisy).float()
    return sent


def local_epsilon(config: PrivacyConfig, rounds: int) -> float | None:
    """Epsilon of a client that has trained in a number of rounds.

    Args:
        config: noise multiplier and delta.
        rounds: number of rounds in which the client may have trained, repeated ones included.

    Returns:
        Epsilon, or None if it is infinite because there is no noise.

    Raises:
        UserError: the accountant is not installed.
    """
    # Two clipped changes differ by at most 2 S, so the multiplier is relative to twice the clip.
    return epsilon(config.noise / 2, rounds, config.delta)
