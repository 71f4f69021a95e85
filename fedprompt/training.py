"""Local training of K clients at once.

Every prompt tensor gets a leading client axis. Clients are independent, so the gradient of the sum
of their losses is each client's own gradient, and an elementwise optimiser (SGD with momentum,
AdamW) updates all of them as it would one. Unequal clients: batches are padded and masked, and a
client that has made its last step leaves the cohort with its optimiser state.

Shape suffixes: K clients, S steps, B images of a batch, N images of all clients, D joint embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedprompt.methods.base import Batch, Method, Tensors, stack
from fedprompt.rng import generator
from fedprompt.schema import TrainingConfig


@dataclass(frozen=True)
class ClientData:
    """A client's local training images: L2-normalised features and labels (n,).

    `features_ND` is (n, D), or (views x n, D) where each image has several views: view v of image i
    is row v n + i, and training draws one of them per image and epoch.
    """

    client: int
    features_ND: Tensor
    labels_N: Tensor
    views: int = 1

    def __len__(self) -> int:
        """Number of images n."""
        return len(self.labels_N)


@dataclass(frozen=True)
class LocalResult:
    """What local training leaves behind on one client.

    `losses` are means over all images seen in the round, by loss term, with their sum as `loss`.
    """

    client: int
    shared: Tensors
    private: Tensors
    num_examples: int
    losses: dict[str, float]


def learning_rate(config: TrainingConfig, server_round: int, rounds: int) -> float:
    """Learning rate of round 1 .. `rounds`; the cosine falls over rounds and is not restarted.

    Source: CoOp's cosine schedule, with one step per communication round.
    """
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (server_round - 1) / max(rounds, 1)))


def train_cohort(
    method: Method,
    shared: Sequence[Tensors],
    private: Sequence[Tensors],
    data: Sequence[ClientData],
    config: TrainingConfig,
    *,
    seed: int,
    server_round: int,
    rounds: int,
) -> list[LocalResult]:
    """Train K clients for `config.local_epochs` passes over their own images.

    Args:
        method: supplies the loss.
        shared: per client, the shared tensors received (no client axis).
        private: per client, its private tensors (no client axis).
        data: per client, its images; at least one each.
        config: optimiser, batch size, epochs, schedule.
        seed: keys the order of images with round, client and epoch.
        server_round: 1-based round.
        rounds: total rounds, for the schedule.

    Returns:
        One result per client in the order given, tensors on the CPU, gradients for nothing else.
    """
    order = sorted(range(len(data)), key=lambda k: -_steps(len(data[k]), config))
    device = method.clip.device
    schedule = _batches([data[k] for k in order], config, seed, server_round)
    features_ND = torch.cat([data[k].features_ND for k in order]).to(device)
    labels_N = torch.cat([data[k].labels_N.repeat(data[k].views) for k in order]).to(device)
    index_SKB, mask_SKB = schedule.index_SKB.to(device), schedule.mask_SKB.to(device)
    values = {
        **{("shared", n): v for n, v in stack([shared[k] for k in order], device).items()},
        **{("private", n): v for n, v in stack([private[k] for k in order], device).items()},
    }
    final = {name: value.clone() for name, value in values.items()}
    lr = learning_rate(config, server_round, rounds)
    totals: dict[str, Tensor] = {}
    state: list[dict[str, Tensor]] | None = None
    for first, stop, active in schedule.segments:
        # Clients are sorted by their number of steps, so those still training come first.
        leaves = {n: v[:active].clone().requires_grad_() for n, v in values.items()}
        optimizer = _optimizer(config, list(leaves.values()), lr)
        _restore(optimizer, state, active)
        for step in range(first, stop):
            index_KB, mask_KB = index_SKB[step, :active], mask_SKB[step, :active]
            batch = Batch(features_ND[index_KB], labels_N[index_KB], mask_KB)
            shared_K = {n: v for (kind, n), v in leaves.items() if kind == "shared"}
            private_K = {n: v for (kind, n), v in leaves.items() if kind == "private"}
            encoded = method.encode(shared_K, private_K)
            terms = method.terms(shared_K, private_K, encoded, batch)
            loss_K = torch.stack(list(terms.values())).sum(0)
            optimizer.zero_grad(set_to_none=True)
            loss_K.sum().backward()
            optimizer.step()
            images_K = mask_KB.sum(-1)
            for term, term_K in (*terms.items(), ("loss", loss_K)):
                total_K = totals.setdefault(term, loss_K.new_zeros(len(data)))
                total_K[:active] += term_K.detach() * images_K
        values = {n: v.detach() for n, v in leaves.items()}
        for name, value in values.items():
            final[name][:active] = value
        state = [dict(optimizer.state[p]) for p in leaves.values()]
    place = {k: row for row, k in enumerate(order)}
    cpu_final = {n: v.cpu() for n, v in final.items()}
    cpu_totals = {n: v.cpu() for n, v in totals.items()}
    results = []
    for k, client in enumerate(data):
        row, seen = place[k], len(client) * config.local_epochs
        results.append(
            LocalResult(
                client=client.client,
                shared={
                    n: v[row].clone() for (kind, n), v in cpu_final.items() if kind == "shared"
                },
                private={
                    n: v[row].clone() for (kind, n), v in cpu_final.items() if kind == "private"
                },
                num_examples=len(client),
                losses={n: float(v[row]) / seen for n, v in cpu_totals.items()},
            )
        )
    return results


@dataclass(frozen=True)
class _Schedule:
    """Batches of a cohort; `segments` are (first step, last step + 1, active clients)."""

    index_SKB: Tensor
    mask_SKB: Tensor
    segments: tuple[tuple[int, int, int], ...]


def _steps(images: int, config: TrainingConfig) -> int:
    return config.local_epochs * math.ceil(images / config.batch_size)


def _batches(
    data: Sequence[ClientData], config: TrainingConfig, seed: int, server_round: int
) -> _Schedule:
    """Every client's own seeded batches, padded to a common shape; the last batch is partial."""
    steps_K = [_steps(len(d), config) for d in data]
    width = min(config.batch_size, max(len(d) for d in data))
    index = np.zeros((max(steps_K), len(data), width), dtype=np.int64)
    mask = np.zeros(index.shape, dtype=bool)
    offset = 0
    for k, client in enumerate(data):
        step, n = 0, len(client)
        for epoch in range(config.local_epochs):
            draw = generator(seed, "shuffle", server_round, client.client, epoch)
            shuffled = draw.permutation(n) + offset
            if client.views > 1:
                views = generator(seed, "view", server_round, client.client, epoch)
                shuffled += n * views.integers(client.views, size=n)
            for begin in range(0, n, config.batch_size):
                part = shuffled[begin : begin + config.batch_size]
                index[step, k, : len(part)] = part
                mask[step, k, : len(part)] = True
                step += 1
        offset += n * client.views
    segments, first = [], 0
    for stop in sorted(set(steps_K)):
        segments.append((first, stop, sum(s >= stop for s in steps_K)))
        first = stop
    return _Schedule(torch.from_numpy(index), torch.from_numpy(mask), tuple(segments))


def _optimizer(config: TrainingConfig, leaves: list[Tensor], lr: float) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(leaves, lr=lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        leaves, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay
    )


def _restore(
    optimizer: torch.optim.Optimizer, state: list[dict[str, Tensor]] | None, active: int
) -> None:
    """Hand on the optimiser state of the clients that go on; counters are the same for all."""
    if state is None:
        return
    for leaf, kept in zip(optimizer.param_groups[0]["params"], state, strict=True):
        optimizer.state[leaf] = {
            n: v[:active].clone() if torch.is_tensor(v) and v.dim() > 0 else v
            for n, v in kept.items()
        }
