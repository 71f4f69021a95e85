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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedprompt.config.cycles import place_of
from fedprompt.config.protection import PrivacyConfig
from fedprompt.config.schema import TrainingConfig
from fedprompt.data.features.feed import Feed, resident
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import (
    UNLABELLED,
    Batch,
    ClientData,
    Method,
    RoundInfo,
    Tensors,
    row_of,
    stack,
)
from fedprompt.methods.parts.draws import StepDraws
from fedprompt.methods.parts.local_step import LocalStep, containers, named, new_leaves
from fedprompt.methods.parts.private_step import PrivateStep
from fedprompt.methods.parts.schedule import (
    draw_batches,
    draw_poisson,
    expected_size,
    local_steps,
)
from fedprompt.methods.parts.step_graphs import StepGraphs
from fedprompt.optimizer import (
    MOMENTUM,
    State,
    build_optimizer,
    clip_gradients,
    fusable,
    keeps_momentum,
    kept_momentum,
    restore,
    stored_momentum,
)
from fedprompt.rng import secret_generator
from fedprompt.runtime.transfer import moved_by_name


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
            terms as `loss`; empty if the method trains no tensor.
        statistics: what the method measures besides (`Method.measured`), averaged likewise.
    """

    client: int
    shared: Tensors
    private: Tensors
    momentum: Tensors
    num_examples: int
    losses: dict[str, float]
    statistics: dict[str, float]


def learning_rate(config: TrainingConfig, server_round: int, rounds: int, cycles: int = 1) -> float:
    """Learning rate of a round; the cosine falls over all rounds, or over those of a cycle.

    Source: CoOp's cosine schedule, with one step per communication round.

    Args:
        config: the `training` section.
        server_round: the round, 1 .. `rounds`.
        rounds: number of rounds of the experiment.
        cycles: how often the cosine runs through (`MethodConfig.lr_cycles`).

    Returns:
        The learning rate. It is `config.lr` in the first round of a cycle, and still above 0 in the
        last one.
    """
    if config.schedule == "constant":
        return config.lr
    place = place_of(server_round, rounds, cycles)
    return config.lr * 0.5 * (1 + math.cos(math.pi * place.position / place.length))


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
    graphs: StepGraphs | None = None,
    max_steps: int | None = None,
    privacy: PrivacyConfig | None = None,
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
        graphs: recordings of this method's steps, which are replayed where they can be; None takes
            every step plainly. The results are the same.
        max_steps: steps after which a client stops, at least 1; None for all of its epochs.
        privacy: with its `image_noise`, clients train by DP-SGD, and no step is recorded.

    Returns:
        One result per client, in the order given. The arguments are not changed.
    """
    # Longest training first, so that the clients still training are always a prefix of the block.
    order = sorted(range(len(data)), key=lambda k: -local_steps(len(data[k]), config))
    device = method.clip.device
    ordered = [data[k] for k in order]
    noisy = privacy if privacy is not None and privacy.image_noise else None
    if noisy is not None and noisy.image_sampling == "poisson":
        schedule = draw_poisson(ordered, config, noisy.noise_seed, server_round, max_steps)
    else:
        schedule = draw_batches(ordered, config, seed, server_round, max_steps)
    limit = math.inf if max_steps is None else max_steps
    steps = tuple(int(min(local_steps(len(d), config), limit)) for d in ordered)
    inputs_N = Inputs.cat([d.inputs for d in ordered])
    there_N = resident(inputs_N, device)
    second = "second_view" in method.needs_to_train
    # Everything that the round needs, in as few copies as possible.
    received_K, private_K, kept_K, numbers, columns_N = moved_by_name(
        [
            stack([received[k] for k in order]),
            stack([private[k] for k in order]),
            stored_momentum([momentum[k] for k in order])
            if momentum and keeps_momentum(config)
            else {},
            {
                "index_SKB": schedule.index_SKB,
                **({"second_SKB": schedule.second_SKB} if second else {}),
                **({"expected_K": _expected_sizes(ordered, config)} if noisy is not None else {}),
                "mask_SKB": schedule.mask_SKB,
                "images_SK": schedule.mask_SKB.sum(-1).float(),
                # A client's inputs hold all images of view 0, then all of view 1, and so on.
                "labels_N": torch.cat([_of_all_views(d) for d in ordered]),
                "steps_K": torch.tensor(steps),
                "class_counts_KC": _class_counts(ordered, len(method.task.class_names)),
            },
            there_N.columns(),
        ],
        device,
    )
    images = _Images(
        Feed(
            Inputs(**columns_N),
            numbers["index_SKB"],
            None if there_N.pixels is inputs_N.pixels else inputs_N.pixels,
            schedule.index_SKB,
        ),
        numbers,
        columns_N["features"],
        columns_N.get("statistics"),
    )
    clients = tuple(d.client for d in ordered)
    round_info = RoundInfo(
        clients=clients,
        seed=seed,
        server_round=server_round,
        rounds=rounds,
        lr=learning_rate(config, server_round, rounds, method.config.lr_cycles),
        received=received_K,
        steps_K=numbers["steps_K"],
        class_counts_KC=numbers["class_counts_KC"],
        momentum=config.momentum if config.optimizer == "sgd" else 0.0,
        ahead=StepDraws(clients, steps, device),
    )
    # Extras are sent by the server beside the shared tensors. They are inputs of `encode`, but
    # they are neither trained nor uploaded.
    extra = method.init_extras(seed).keys()
    shared_K, private_K = method.start_round(
        {n: v for n, v in received_K.items() if n not in extra}, private_K, round_info
    )
    at_rest = method.at_rest(private_K, round_info)
    both = named(shared_K, private_K)
    trained = {n: v for n, v in both.items() if n not in method.frozen}
    fixed = {n: v for n, v in both.items() if n in method.frozen}
    fixed |= {f"shared.{n}": received_K[n] for n in extra}
    kept = kept_momentum(trained, kept_K) if keeps_momentum(config) else None

    def open_step(start: Tensors, fixed: Tensors, present: RoundInfo) -> LocalStep:
        if noisy is not None:
            expected_A = numbers["expected_K"][: len(present.clients)]
            return PrivateStep(method, new_leaves(start), fixed, noisy, expected_A)
        if graphs is not None:
            return graphs.step(start, fixed, present)
        return LocalStep(method, new_leaves(start), fixed)

    final, totals, velocity = _descend(
        method,
        config,
        # A method without trained tensors has nothing to descend.
        schedule.segments if trained else (),
        images,
        round_info,
        trained=trained,
        fixed=fixed,
        at_rest=at_rest,
        momentum=kept,
        open_step=open_step,
    )
    frozen = {n: v for n, v in fixed.items() if n.removeprefix("shared.") not in extra}
    shared_K, private_K = method.end_round(*containers(final | frozen), round_info)
    shared_K, private_K, velocity, totals = moved_by_name(
        [shared_K, private_K, velocity, totals], torch.device("cpu")
    )
    # Undo the sorting: the results are in the order of the arguments.
    place = {k: row for row, k in enumerate(order)}
    seen_K = schedule.mask_SKB.sum((0, 2)).tolist()
    results = []
    for k, client in enumerate(data):
        row, seen = place[k], seen_K[place[k]]
        # Poisson sampling may have drawn no image at all.
        means = {n: float(v[row]) / max(1, seen) for n, v in totals.items()}
        computed = (
            method.shared_from_data(client)
            if noisy is None
            else method.noisy_from_data(client, _image_noise(noisy, server_round, client.client))
        )
        results.append(
            LocalResult(
                client=client.client,
                shared={n: v[row].clone() for n, v in shared_K.items()} | computed,
                private=_rows(private_K, row, private[k]),
                momentum=_rows(velocity, row, {f"private.{n}": v for n, v in private[k].items()}),
                num_examples=len(client),
                losses={n: v for n, v in means.items() if n not in method.measured},
                statistics={n: v for n, v in means.items() if n in method.measured},
            )
        )
    return results


@dataclass(frozen=True)
class _Images:
    """The images of all steps.

    Attributes:
        feed: gives every step its inputs.
        numbers: labels of all images (N,), and of every step and client its rows `index_SKB`, its
            `mask_SKB` and its number of images `images_SK`; on the device. `second_SKB` has the
            rows of second views, if the method needs them.
        features_ND: features of all views of all images, on the device.
        statistics_N: their statistics, if the method needs them.
    """

    feed: Feed
    numbers: Tensors
    features_ND: Tensor
    statistics_N: Tensor | None

    def batch(self, step: int, round_info: RoundInfo) -> Batch:
        """The batch of one step, of the clients that still train."""
        active = len(round_info.clients)
        index_AB = self.numbers["index_SKB"][step, :active]
        labels_AB = self.numbers["labels_N"][index_AB]
        mask_AB = self.numbers["mask_SKB"][step, :active]
        inputs = self.feed.batch(step, active)
        second_ABD = second_statistics = None
        if "second_SKB" in self.numbers:
            second_AB = self.numbers["second_SKB"][step, :active]
            second_ABD = self.features_ND[second_AB]
            if self.statistics_N is not None:
                second_statistics = self.statistics_N[second_AB]
        return Batch(inputs, labels_AB, mask_AB, round_info, step, second_ABD, second_statistics)


def _descend(
    method: Method,
    config: TrainingConfig,
    segments: Sequence[tuple[int, int, int]],
    images: _Images,
    round_info: RoundInfo,
    *,
    trained: Tensors,
    fixed: Tensors,
    at_rest: Tensors,
    momentum: Tensors | None,
    open_step: Callable[[Tensors, Tensors, RoundInfo], LocalStep],
) -> tuple[Tensors, Tensors, Tensors]:
    """Take all local steps.

    Nothing in a step waits for the device, or copies anything to or from it, unless the method
    does.

    Args:
        method: supplies encoding, loss and gradients.
        config: the optimiser and its settings.
        segments: first step, last step + 1 and number of clients, as in `Schedule`.
        images: the images of all steps, on the device.
        round_info: the round, with clients in the order of the schedule.
        trained: tensors (K, ...) that the optimiser updates, with names as in `named`.
        fixed: tensors (K, ...) that are used and not changed, with names as in `named`.
        at_rest: what `Method.at_rest` returned.
        momentum: the momentum of each trained tensor before the first step, (K, ...), or None if
            it starts at zero and is not kept.
        open_step: returns what computes the steps in which the same clients train, from their
            trained and fixed tensors and their round.

    Returns:
        The `trained` tensors (K, ...) after the last step; the sum over all images seen of every
        loss term (K,); and the momentum of each trained tensor (K, ...), if it is kept.
    """
    final = {n: v.clone() for n, v in trained.items()}
    terms: tuple[str, ...] = ()
    totals_TK: Tensor | None = None
    velocity = {n: v.clone() for n, v in (momentum or {}).items()}
    state: State | None = None if momentum is None else [{MOMENTUM: momentum[n]} for n in trained]
    for first, stop, active in segments:
        # Within a segment the same A clients train. New leaves and a new optimiser per segment
        # drop the clients that are done: with a zero gradient, momentum and weight decay would
        # keep moving their prompts.
        start = {n: v[:active] for n, v in trained.items()}
        fixed_A = {n: v[:active] for n, v in fixed.items()}
        present = round_info.first(active)
        compute = open_step(start, fixed_A, present)
        leaves = compute.leaves
        optimizer = build_optimizer(config, leaves, round_info.lr, method.lr_scale)
        restore(optimizer, list(leaves.values()), state, active)
        for step in range(first, stop):
            computed = compute(images.batch(step, present))
            gradients: Mapping[str, Tensor | None] = computed.gradients
            if config.clip_grad_norm is not None:
                gradients = clip_gradients(gradients, config.clip_grad_norm, at_rest)
            # The method may have clipped, projected or noised them, so `backward` is not used.
            for name, leaf in leaves.items():
                leaf.grad = fusable(gradients[name])
            optimizer.step()
            # One optimiser step updates the tensors of all clients, so those at rest are put back.
            for name, rest_K in at_rest.items():
                _put_back(leaves[name], start[name], rest_K[:active])
            if totals_TK is None:
                terms = computed.terms
                totals_TK = computed.values_TA.new_zeros(len(terms), len(round_info.clients))
            # Terms are means over a batch, and the last batch may be smaller: weighted by images,
            # the round's value is a mean over images and not over batches.
            weight_A = images.numbers["images_SK"][step, :active]
            totals_TK[:, :active] += computed.values_TA * weight_A
            images.feed.prefetch(step + 1, active)
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
    return final, {} if totals_TK is None else dict(zip(terms, totals_TK, strict=True)), velocity


def _expected_sizes(data: Sequence[ClientData], config: TrainingConfig) -> Tensor:
    """The mean number of images in a step of each client, (K,)."""
    return torch.tensor([expected_size(len(client), config) for client in data])


def _image_noise(
    privacy: PrivacyConfig, server_round: int, client: int
) -> Callable[[tuple[int, ...]], Tensor]:
    """What draws noise of standard deviation `image_noise` for `Method.noisy_from_data`."""
    draw = secret_generator(privacy.noise_seed, "image noise of sums", server_round, client)
    return lambda shape: torch.from_numpy(privacy.image_noise * draw.standard_normal(shape))


def _rows(stacked_K: Tensors, row: int, own: Tensors) -> Tensors:
    """One client's tensors out of stacks (K, ...); those in `own` without their padding."""
    return {n: row_of(v, row, own.get(n, v[row])) for n, v in stacked_K.items()}


@torch.no_grad()
def _put_back(tensor: Tensor, start: Tensor, rest_A: Tensor) -> None:
    """Return the rows of `tensor` (A, ...) where `rest_A` is true to their values in `start`."""
    tensor.copy_(torch.where(rest_A.view(-1, *[1] * (tensor.dim() - 1)), start, tensor))


def _of_all_views(data: ClientData) -> Tensor:
    """The labels of a client's images in the order of its inputs: view 0, then view 1, and on."""
    return data.labels_N.repeat(data.views, *[1] * (data.labels_N.dim() - 1))


def _class_counts(data: Sequence[ClientData], classes: int) -> Tensor:
    """Labelled training images per client and class (K, C)."""
    if data[0].labels_N.dim() > 1:
        return torch.stack([d.labels_N.sum(0).long() for d in data])
    known = [d.labels_N[d.labels_N != UNLABELLED] for d in data]
    return torch.stack([torch.bincount(labels_N, minlength=classes) for labels_N in known])
