"""Local training of a block of K clients.

A client (in a simulation, a block of clients) calls `train_clients` when the server asks it to
train. Every prompt tensor has a leading client axis. Clients are independent, so the gradient of
the sum of their losses holds each client's own gradient, and an elementwise optimiser (SGD with
momentum, Adam, AdamW) updates all of them as it would update a single one. Batches of unequal size
are padded and masked. Clients are sorted by their number of steps; one that has taken its last step
leaves the block together with its optimiser state.

Shape suffixes: K clients, S steps, B images of a batch, N images of all clients, C classes, A
clients that are still training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedprompt.config.schema import TrainingConfig
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Batch, ClientData, Method, RoundInfo, Tensors, row_of, stack
from fedprompt.optimizer import (
    MOMENTUM,
    State,
    build_optimizer,
    clip_gradients,
    keeps_momentum,
    kept_momentum,
    restore,
)
from fedprompt.rng import generator


@dataclass(frozen=True)
class LocalResult:
    """The result of local training on one client.

    Attributes:
        client: client id.
        shared: its shared tensors after training, without a client axis, on the CPU. They are what
            the client uploads.
        private: its private tensors after training, without a client axis, on the CPU. They never
            leave the client.
        momentum: the optimiser's momentum of each trained tensor after the last step, as
            `shared.<name>` or `private.<name>`, without a client axis, on the CPU. It is as private
            as `private`, and empty unless the config keeps it.
        num_examples: the number of its training images, each counted once whatever the number of
            epochs and views. It is the client's weight in an average over examples.
        losses: every loss term, averaged over all images seen in the round, and the sum of these
            terms as `loss`.
    """

    client: int
    shared: Tensors
    private: Tensors
    momentum: Tensors
    num_examples: int
    losses: dict[str, float]


def learning_rate(config: TrainingConfig, server_round: int, rounds: int) -> float:
    """Learning rate of a round; the cosine falls over all rounds and is never restarted.

    Source: CoOp's cosine schedule, with one step per communication round.

    Args:
        config: the `training` section.
        server_round: the round, 1 .. `rounds`.
        rounds: number of rounds of the experiment.

    Returns:
        The learning rate. It is `config.lr` in round 1, and still above 0 in the last round.
    """
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (server_round - 1) / max(rounds, 1)))


def local_steps(images: int, config: TrainingConfig) -> int:
    """Optimiser steps that a client takes in one round.

    Args:
        images: the number of its training images.
        config: the `training` section.
    """
    # Rounded up: with `drop_last`, a client smaller than a batch would never train.
    return config.local_epochs * math.ceil(images / config.batch_size)


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
    momentum: Sequence[Tensors] | None = None,
) -> list[LocalResult]:
    """Train K clients for `config.local_epochs` passes over their own images.

    A client's result does not depend on the other clients of the block, up to the last bits of its
    floats.

    Args:
        method: supplies encoding, loss, gradients, and what happens at both ends of a round.
        received: per client, the shared tensors and extras that the server sent, without a client
            axis.
        private: per client, its private tensors, without a client axis.
        data: per client, its images and labels; at least one image each.
        config: optimiser, batch size, epochs and schedule.
        seed: the experiment's seed. With round, client and epoch it determines the order of images.
        server_round: the round, counted from 1.
        rounds: number of rounds of the experiment, for the learning-rate schedule.
        momentum: per client, the `momentum` of its last result, or nothing before its first; used
            if the config keeps it. None if no client has any.

    Returns:
        One result per client, in the order given. The arguments are not changed.
    """
    # Longest training first, so that the clients still training are always a prefix of the block.
    order = sorted(range(len(data)), key=lambda k: -local_steps(len(data[k]), config))
    device = method.clip.device
    ordered = [data[k] for k in order]
    schedule = _batches(ordered, config, seed, server_round)
    inputs_N = Inputs.cat([d.inputs for d in ordered])
    # Features are moved once. Pixels would fill a GPU, so they are moved batch by batch.
    if inputs_N.pixels is None:
        inputs_N = inputs_N.on(device)
    # The inputs of a client hold all images of view 0, then all of view 1, and so on.
    labels_N = torch.cat([d.labels_N.repeat(d.views) for d in ordered]).to(device)
    received_K = stack([received[k] for k in order], device)
    round_info = RoundInfo(
        clients=tuple(d.client for d in ordered),
        seed=seed,
        server_round=server_round,
        rounds=rounds,
        lr=learning_rate(config, server_round, rounds),
        received=received_K,
        steps_K=torch.tensor([local_steps(len(d), config) for d in ordered], device=device),
        class_counts_KC=_class_counts(ordered, len(method.task.class_names)).to(device),
        momentum=config.momentum if config.optimizer == "sgd" else 0.0,
    )
    # Extras are sent by the server beside the shared tensors. They are inputs of `encode`, but
    # they are neither trained nor uploaded.
    extra = method.init_extras(seed).keys()
    shared_K, private_K = method.start_round(
        {n: v for n, v in received_K.items() if n not in extra},
        stack([private[k] for k in order], device),
        round_info,
    )
    at_rest = method.at_rest(private_K, round_info)
    names = _named(shared_K, private_K)
    trained = {n: v for n, v in names.items() if n not in method.frozen}
    fixed = {n: v for n, v in names.items() if n in method.frozen}
    fixed |= {f"shared.{n}": received_K[n] for n in extra}
    kept = None
    if keeps_momentum(config):
        kept = kept_momentum(trained, [momentum[k] if momentum else {} for k in order])
    final, totals, velocity = _descend(
        method,
        config,
        schedule,
        inputs_N,
        labels_N,
        round_info,
        trained=trained,
        fixed=fixed,
        at_rest=at_rest,
        momentum=kept,
    )
    frozen = {n: v for n, v in fixed.items() if n.removeprefix("shared.") not in extra}
    shared_K, private_K = method.end_round(*_containers(final | frozen), round_info)
    shared_K = {n: v.cpu() for n, v in shared_K.items()}
    private_K = {n: v.cpu() for n, v in private_K.items()}
    velocity = {n: v.cpu() for n, v in velocity.items()}
    totals = {n: v.cpu() for n, v in totals.items()}
    # Undo the sorting: the results are in the order of the arguments.
    place = {k: row for row, k in enumerate(order)}
    results = []
    for k, client in enumerate(data):
        row, seen = place[k], len(client) * config.local_epochs
        results.append(
            LocalResult(
                client=client.client,
                shared={n: v[row].clone() for n, v in shared_K.items()},
                private=_rows(private_K, row, private[k]),
                momentum=_rows(velocity, row, {f"private.{n}": v for n, v in private[k].items()}),
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
    at_rest: Tensors,
    momentum: Tensors | None,
) -> tuple[Tensors, Tensors, Tensors]:
    """Take all local steps.

    Args:
        method: supplies encoding, loss and gradients.
        config: the optimiser and its settings.
        schedule: which images each client sees in each step.
        inputs_N: images of all clients; pixels are on the CPU, features on the device.
        labels_N: class indices (N,), on the device.
        round_info: the round, with clients in the order of the schedule.
        trained: tensors (K, ...) that the optimiser updates, with names as in `_named`.
        fixed: tensors (K, ...) that are used and not changed, with names as in `_named`.
        at_rest: what `Method.at_rest` returned.
        momentum: the momentum of each trained tensor before the first step, (K, ...), or None if
            it starts at zero and is not kept.

    Returns:
        The `trained` tensors (K, ...) after the last step; the sum over all images seen of every
        loss term (K,); and the momentum of each trained tensor (K, ...), if it is kept.
    """
    device = method.clip.device
    final = {n: v.clone() for n, v in trained.items()}
    totals: dict[str, Tensor] = {}
    velocity = {n: v.clone() for n, v in (momentum or {}).items()}
    state: State | None = None if momentum is None else [{MOMENTUM: momentum[n]} for n in trained]
    for first, stop, active in schedule.segments:
        # Within a segment the same A clients train. New leaves and a new optimiser per segment
        # drop the clients that are done: with a zero gradient, momentum and weight decay would
        # keep moving their prompts.
        leaves = {n: v[:active].clone().requires_grad_() for n, v in trained.items()}
        present = round_info.first(active)
        shared_A, private_A = _containers(leaves | {n: v[:active] for n, v in fixed.items()})
        optimizer = build_optimizer(config, leaves, round_info.lr, method.lr_scale)
        restore(optimizer, list(leaves.values()), state, active)
        for step in range(first, stop):
            index_KB = schedule.index_SKB[step, :active]
            mask_KB = schedule.mask_SKB[step, :active].to(device)
            inputs_KB = inputs_N[index_KB].on(device)
            batch = Batch(inputs_KB, labels_N[index_KB], mask_KB, present, step)
            # The class prompts are encoded in every step, since the gradient flows through them.
            encoded = method.encode(shared_A, private_A)
            loss_terms = method.loss_terms(shared_A, private_A, encoded, batch)
            gradients = method.gradients(loss_terms, leaves, batch)
            if config.clip_grad_norm is not None:
                gradients = clip_gradients(gradients, config.clip_grad_norm, at_rest)
            # The method may have clipped, projected or noised them, so `backward` is not used.
            for name, leaf in leaves.items():
                leaf.grad = gradients[name]
            optimizer.step()
            # One optimiser step updates the tensors of all clients, so those at rest are put back.
            for name, rest_K in at_rest.items():
                _put_back(leaves[name], trained[name][:active], rest_K[:active])
            loss_K = torch.stack(list(loss_terms.values())).sum(0)
            images_K = mask_KB.sum(-1)
            for term, term_K in (*loss_terms.items(), ("loss", loss_K)):
                # Terms are means over a batch, and the last batch may be smaller: weighted by
                # images, the round's value is a mean over images and not over batches.
                total_K = totals.setdefault(term, loss_K.new_zeros(len(round_info.clients)))
                total_K[:active] += term_K.detach() * images_K
        # The next segment has fewer clients; `final` keeps the values of those that leave here.
        trained = {n: v.detach() for n, v in leaves.items()}
        for name, value in trained.items():
            final[name][:active] = value
        state = [dict(optimizer.state[p]) for p in leaves.values()]
        if momentum is not None:
            for name, leaf_state in zip(trained, state, strict=True):
                velocity[name][:active] = leaf_state[MOMENTUM]
    if momentum is not None:
        for name, rest_K in at_rest.items():
            _put_back(velocity[name], momentum[name], rest_K)
    return final, totals, velocity


def _rows(stacked_K: Tensors, row: int, own: Tensors) -> Tensors:
    """One client's tensors out of stacks (K, ...); those in `own` without their padding."""
    return {n: row_of(v, row, own.get(n, v[row])) for n, v in stacked_K.items()}


@torch.no_grad()
def _put_back(tensor: Tensor, start: Tensor, rest_A: Tensor) -> None:
    """Return the rows of `tensor` (A, ...) where `rest_A` is true to their values in `start`."""
    tensor.copy_(torch.where(rest_A.view(-1, *[1] * (tensor.dim() - 1)), start, tensor))


def _named(shared: Tensors, private: Tensors) -> Tensors:
    """Both containers in one dict; names are `shared.<name>` and `private.<name>`."""
    return {f"shared.{n}": v for n, v in shared.items()} | {
        f"private.{n}": v for n, v in private.items()
    }


def _containers(named: Tensors) -> tuple[Tensors, Tensors]:
    """Split tensors with names as in `_named` into the shared and the private container."""
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
    """The batches of a block.

    Attributes:
        index_SKB: rows in `inputs_N` of the images of each step and client.
        mask_SKB: True for images, False for padding, whose index is 0.
        segments: (first step, last step + 1, number of clients that take these steps), in order.
    """

    index_SKB: Tensor
    mask_SKB: Tensor
    segments: tuple[tuple[int, int, int], ...]


def _batches(
    data: Sequence[ClientData], config: TrainingConfig, seed: int, server_round: int
) -> _Schedule:
    """Draw the batches of all clients and pad them to one shape.

    Args:
        data: per client, its images and labels, most steps first.
        config: batch size and epochs.
        seed: the experiment's seed.
        server_round: the round, counted from 1.

    Returns:
        The schedule. The last batch of an epoch may be smaller than `config.batch_size`.
    """
    steps_K = [local_steps(len(d), config) for d in data]
    width = min(config.batch_size, max(len(d) for d in data))
    index = np.zeros((max(steps_K), len(data), width), dtype=np.int64)
    mask = np.zeros(index.shape, dtype=bool)
    offset = 0
    for k, client in enumerate(data):
        step, n = 0, len(client)
        for epoch in range(config.local_epochs):
            # The key names the client and not its place in the block, so that a client sees the
            # same batches in any block, on any worker, and after a resume.
            draw = generator(seed, "shuffle", server_round, client.client, epoch)
            shuffled = draw.permutation(n) + offset
            # Each image appears once per epoch, in a view drawn at random; views are n rows apart.
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
