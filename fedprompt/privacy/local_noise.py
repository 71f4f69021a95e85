"""Noise that a client adds before anything leaves it: client-level local differential privacy.

Source: the Gaussian mechanism (Dwork and Roth, 2014, theorem A.1) on a client's clipped change, as
in Geyer, Klein and Nabi (2017, arXiv 1712.07557), but on the client: it sends
    received + Delta min(1, S / |Delta|) + N(0, z^2 S^2 I),
the norm over all shared tensors together. Any two changes differ by at most 2 S, so one round
costs as much as a Gaussian release with noise multiplier z / 2, and a client pays for every round
in which it trains. Such a reply says nothing else: no losses, and one image, so that clients count
alike.

Covered: the shared tensors of a reply, against everybody, the server included. Not covered: the
accuracy of personal models, which clients still report (`protocols: [global]` turns that off).

The noise comes from the operating system, so that nobody can subtract it; two runs then differ.
`privacy.noise_seed` fixes it, for tests.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedprompt.config.schema import PrivacyConfig
from fedprompt.methods.base import Tensors
from fedprompt.privacy.accountant import epsilon
from fedprompt.rng import generator


def protected(
    received: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    config: PrivacyConfig,
    *,
    server_round: int,
    client: int,
) -> Tensors:
    """What a client sends in place of its trained shared tensors, float32, on the CPU."""
    change = {n: t.double().cpu() - received[n].double().cpu() for n, t in trained.items()}
    norm = float(torch.sqrt(sum((c.square().sum() for c in change.values()), torch.zeros(()))))
    factor = min(1.0, config.clip / norm) if norm > 0 else 1.0
    draw = _generator(config.noise_seed, server_round, client)
    sent = {}
    for name, values in sorted(change.items()):
        noise = torch.from_numpy(np.asarray(draw.standard_normal(tuple(values.shape))))
        noisy = factor * values + config.noise * config.clip * noise
        sent[name] = (received[name].double().cpu() + noisy).float()
    return sent


def local_epsilon(config: PrivacyConfig, rounds: int) -> float | None:
    """Epsilon of a client that has trained in `rounds` rounds; None without noise (infinite).

    Raises:
        UserError: the accountant is not installed.
    """
    return epsilon(config.noise / 2, rounds, config.delta)


def _generator(seed: int | None, server_round: int, client: int) -> np.random.Generator:
    if seed is None:
        return np.random.Generator(np.random.PCG64(secrets.randbits(256)))
    return generator(seed, "local noise", server_round, client)
