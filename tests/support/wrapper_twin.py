"""Plain federated training for the tests of wrappers: one client, one step after the other.

Gradients come from `text_twin`'s full text pass by autograd; momentum, weight decay and averages
are written out here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.schema import TrainingConfig
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import ClientData, Method, Tensors
from fedprompt.rng import generator
from fedprompt.training import train_clients
from tests.support.builders import CLASS_NAMES
from tests.support.text_twin import class_features

SEED, ROUNDS = 3, 4
SIZES = (7, 5, 6)
"""Training images of the clients."""
Step = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Prompt, features and labels -> the gradient that moves the prompt."""


def clients(clip: FrozenCLIP) -> list[ClientData]:
    """Three clients with different classes and numbers of images."""
    found = []
    for k, size in enumerate(SIZES):
        draw = generator(0, "wrapper twin", k)
        features = torch.from_numpy(draw.standard_normal((size, clip.embed_dim))).float()
        labels = torch.from_numpy(draw.integers(k, k + 3, size) % len(CLASS_NAMES))
        found.append(ClientData(k, Inputs(F.normalize(features, dim=-1)), labels))
    return found


def config(**options: Any) -> TrainingConfig:
    """Two epochs of batches of three, at a rate that moves prompts far."""
    defaults = {"lr": 0.05, "schedule": "constant", "local_epochs": 2, "batch_size": 3}
    return TrainingConfig(**{**defaults, **options})


def batches(data: ClientData, training: TrainingConfig, server_round: int) -> list[list[int]]:
    """Rows of the client's images, step by step."""
    steps = []
    for epoch in range(training.local_epochs):
        key = ("shuffle", server_round, data.client, epoch)
        order = generator(SEED, *key).permutation(len(data)).tolist()
        size = training.batch_size
        steps += [order[i : i + size] for i in range(0, len(order), size)]
    return steps


def local_sgd(
    data: ClientData, training: TrainingConfig, server_round: int, start: Tensor, step: Step
) -> Tensor:
    """The prompt after the client's steps in a round, from `start`."""
    prompt, velocity = start.clone(), torch.zeros_like(start)
    for rows in batches(data, training, server_round):
        gradient = step(prompt, data.inputs.features[rows], data.labels_N[rows])
        gradient = gradient + training.weight_decay * prompt
        velocity = training.momentum * velocity + gradient
        prompt = prompt - training.lr * velocity
    return prompt


def ce_gradient(clip: FrozenCLIP, prompt: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Gradient of CoOp's cross-entropy with respect to the prompt (M, d)."""
    leaf = prompt.detach().clone().requires_grad_()
    logits = clip.logit_scale * features @ class_features(clip, leaf).T
    return torch.autograd.grad(F.cross_entropy(logits, labels), leaf)[0]


def train(
    method: Method,
    received: list[Tensors],
    private: list[Tensors],
    data: list[ClientData],
    training: TrainingConfig,
    server_round: int,
) -> list[Any]:
    """Our own local training of some clients at once."""
    return train_clients(
        method,
        received,
        private,
        data,
        training,
        seed=SEED,
        server_round=server_round,
        rounds=ROUNDS,
    )


def near(ours: Tensor, theirs: Tensor, start: Tensor) -> None:
    """Equal up to 1e-4 of how far `theirs` has moved from `start`."""
    moved = float((theirs - start).abs().max())
    assert moved > 1e-3, "nothing moved"
    assert float((ours - theirs).abs().max()) <= 1e-4 * moved
