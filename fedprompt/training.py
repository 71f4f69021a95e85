"""Local training of a block of K clients.

Every prompt tensor has a leading client axis. Clients are independent, so the gradient of the sum
of their losses is each client's own gradient, and an elementwise optimiser (SGD with momentum,
AdamW) updates all of them as it would update one. Clients with unequal numbers of images are padded
and masked, and a client that has taken its last step leaves the block with its optimiser state.

Shape suffixes: K clients, S steps, B images of a batch, N images of all clients, C classes; A the
clients that are still training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedprompt.config.schema import TrainingConfig
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Batch, ClientData, Method, RoundInfo, Tensors, stack
from fedprompt.rng import generator


@dataclass(frozen=True)
class LocalResult:
    """The result of local training on one client.

    Attributes:
        client: client id.
        shared: its shared tensors after training, without a client axis, on the CPU.
        private: its private tensors after training, likewise.
        num_examples: its training images, each counted once.
        losses: mean over all images seen in the round of every loss term, and of their sum as
            `loss`.
    """

    client: int
    shared: Tensors
    private: Tensors
    num_examples: int
    losses: dict[str, float]


def learning_rate(config: TrainingConfig, server_round: int, rounds: int) -> float:
    """Learning rate of a round; the cosine falls over all rounds and is never restarted.

    Source: CoOp's cosine schedule, with one step per communication round.

    Args:
        config: the `training` section.
        server_round: the round, 1 .. `rounds`.
        rounds: number of rounds of the experiment.
    """
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (server_round - 1) / max(rounds, 1)))


def train_clients(
    method: Method,
    received: Sequence[Tensors],
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
        received: per client, the shared tensors and extras that the server sent, without a client
            axis.
        private: per client, its private tensors, without a client axis.
        data: per client, its images and labels; one image or more each.
        config: optimiser, batch size, epochs and schedule.
        seed: keys the order of images, together with round, client and epoch.
        server_round: the round, counted from 1.
        rounds: number of rounds, for the schedule.

    Returns:
        One result per client, in the order given. The arguments are not changed.
    """
    order = sorted(range(len(data)), key=lambda k: -_steps(len(data[k]), config))
    device = method.clip.device
    ordered = [data[k] for k in order]
    schedule = _batches(ordered, config, seed, server_round)
    inputs_N = Inputs.cat([d.inputs for d in ordered])
    if inputs_N.pixels is None:  # pixels would fill a GPU, so they move batch by batch
        inputs_N = inputs_N.on(device)
    labels_N = torch.cat([d.labels_N.repeat(d.views) for d in ordered]).to(device)
    received_K = stack([received[k] for k in order], device)
    round_info = RoundInfo(
        clients=tuple(d.client for d in ordered),
        seed=seed,
        server_round=server_round,
        rounds=rounds,
        lr=learning_rate(config, server_round, rounds),
        received=received_K,
        steps_K=torch.tensor([_steps(len(d), config) for d in ordered], device=device),
        class_counts_KC=_class_counts(ordered, len(method.task.class_names)).to(device),
        momentum=config.momentum if config.optimizer == "sgd" else 0.0,
    )
    extra = method.init_extras(seed).keys()
    shared_K, private_K = method.start_round(
        {n: v for n, v in received_K.items() if n not in extra},
        stack([private[k] for k in order], device),
        round_info,
    )
    names = _named(shared_K, private_K)
    trained = {n: v for n, v in names.items() if n not in method.frozen}
    fixed = {n: v for n, v in names.items() if n in method.frozen}
    fixed |= {f"shared.{n}": received_K[n] for n in extra}
    final, totals = _descend(
        method, config, schedule, inputs_N, labels_N, round_info, trained=trained, fixed=fixed
    )
    frozen = {n: v for n, v in fixed.items() if n.removeprefix("shared.") not in extra}
    shared_K, private_K = method.end_round(*_containers(final | frozen), round_info)
    shared_K = {n: v.cpu() for n, v in shared_K.items()}
    private_K = {n: v.cpu() for n, v in private_K.items()}
    totals = {n: v.cpu() for n, v in totals.items()}
    place = {k: row for row, k in enumerate(order)}
    results = []
    for k, client in enumerate(data):
        row, seen = place[k], len(client) * config.local_epochs
        results.append(
            LocalResult(
                client=client.client,
                shared={n: v[row].clone() for n, v in shared_K.items()},
                private={n: v[row].clone() for n, v in private_K.items()},
                num_examples=len(client),
                losses={n: float(v[row]) / seen for n, v in totals.items()},
            )
        )
    return results


def _descend(
    method: Method,
    config: TrainingConfig,
    schedule: _Schedule,
    inputs_N: Inputs,
    labels_N: Tensor,
    round_info: RoundInfo,
    *,
    trained: Tensors,
    fixed: Tensors,
) -> tuple[Tensors, Tensors]:
    """Take all local steps.

    Returns the `trained` tensors (K, ...) afterwards, and the sum over images of every loss term
    (K,). Names say which container a tensor belongs to. The `fixed` tensors are used, not changed.
    """
    device = method.clip.device
    final = {n: v.clone() for n, v in trained.items()}
    totals: dict[str, Tensor] = {}
    state: list[dict[str, Tensor]] | None = None
    for first, stop, active in schedule.segments:
        # Clients are sorted by their number of steps, so those still training come first.
        leaves = {n: v[:active].clone().requires_grad_() for n, v in trained.items()}
        present = round_info.first(active)
        shared_A, private_A = _containers(leaves | {n: v[:active] for n, v in fixed.items()})
        optimizer = _optimizer(config, leaves, round_info.lr, method.lr_scale)
        _restore(optimizer, list(leaves.values()), state, active)
        for step in range(first, stop):
            index_KB = schedule.index_SKB[step, :active]
            mask_KB = schedule.mask_SKB[step, :active].to(device)
            inputs_KB = inputs_N[index_KB].on(device)
            batch = Batch(inputs_KB, labels_N[index_KB], mask_KB, present, step)
            encoded = method.encode(shared_A, private_A)
            loss_terms = method.loss_terms(shared_A, private_A, encoded, batch)
            gradients = method.gradients(loss_terms, leaves, batch)
            for name, leaf in leaves.items():
                leaf.grad = gradients[name]
            optimizer.step()
            loss_K = torch.stack(list(loss_terms.values())).sum(0)
            images_K = mask_KB.sum(-1)
            for term, term_K in (*loss_terms.items(), ("loss", loss_K)):
                total_K = totals.setdefault(term, loss_K.new_zeros(len(round_info.clients)))
                total_K[:active] += term_K.detach() * images_K
        trained = {n: v.detach() for n, v in leaves.items()}
        for name, value in trained.items():
            final[name][:active] = value
        state = [dict(optimizer.state[p]) for p in leaves.values()]
    return final, totals


def _named(shared: Tensors, private: Tensors) -> Tensors:
    """Both containers in one dict, with the container's name before the tensor's."""
    return {f"shared.{n}": v for n, v in shared.items()} | {
        f"private.{n}": v for n, v in private.items()
    }


def _containers(named: Tensors) -> tuple[Tensors, Tensors]:
    """The shared and the private container of `_named` tensors."""
    shared, private = (
        {n.removeprefix(f"{kind}."): v for n, v in named.items() if n.startswith(f"{kind}.")}
        for kind in ("shared", "private")
    )
    return shared, private


def _class_counts(data: Sequence[ClientData], classes: int) -> Tensor:
    """Training images per client and class (K, C)."""
    return torch.stack([torch.bincount(d.labels_N, minlength=classes) for d in data])


@dataclass(frozen=True)
class _Schedule:
    """Batches of a block.

    Attributes:
        index_SKB: rows of the images of each step, client and batch.
        mask_SKB: which of them are images and not padding.
        segments: (first step, last step + 1, clients still training), in order.
    """

    index_SKB: Tensor
    mask_SKB: Tensor
    segments: tuple[tuple[int, int, int], ...]


def _steps(images: int, config: TrainingConfig) -> int:
    return config.local_epochs * math.ceil(images / config.batch_size)


def _batches(
    data: Sequence[ClientData], config: TrainingConfig, seed: int, server_round: int
) -> _Schedule:
    """Every client's own seeded batches, padded to one shape; its last batch may be partial."""
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


def _optimizer(
    config: TrainingConfig, leaves: Tensors, lr: float, lr_scale: Mapping[str, float]
) -> torch.optim.Optimizer:
    groups = [
        {"params": [leaf], "lr": lr * lr_scale.get(name, 1.0)} for name, leaf in leaves.items()
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    adam = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    first, second = config.betas
    return adam(
        groups, lr=lr, betas=(first, second), eps=config.eps, weight_decay=config.weight_decay
    )


def _restore(
    optimizer: torch.optim.Optimizer,
    leaves: Sequence[Tensor],
    state: list[dict[str, Tensor]] | None,
    active: int,
) -> None:
    """Give the optimiser the state of the clients still training; counters are common to all."""
    if state is None:
        return
    for leaf, leaf_state in zip(leaves, state, strict=True):
        optimizer.state[leaf] = {
            n: v[:active].clone() if torch.is_tensor(v) and v.dim() > 0 else v
            for n, v in leaf_state.items()
        }
