"""When personal models are also tested on the server's test images, and who computes it.

Every client's model on the same images is `personal_on_global` in `metrics.jsonl`. Where nothing is
private and nothing is sent to single clients, all of them are the global model, which the server
has scored already: no client is asked.

Otherwise K clients test K models on N images. That costs little where the image features are
cached, and K * N passes through a tower where `logits` runs one that depends on private tensors,
such as private visual prompts. Counted in positions (rows that pass through a tower), it is
affordable if it costs no more than the training since the last evaluation. The rule depends on the
config and on shapes alone, never on time or memory, so all machines follow it in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedprompt.federation.strategy import SharedPromptStrategy
from fedprompt.methods.base import Tensors, stack
from fedprompt.methods.parts.schedule import local_steps
from fedprompt.workspace import Workspace

FREE_POSITIONS = 1_000_000
"""Positions that are always affordable; about 5,000 images under visual prompts on ViT-B/16."""
TRAINING_PASSES = 3
"""Passes through a tower that a training step is worth: one forward, and two for its gradient."""
KEY = "evaluation.personal_on_global_every"


@dataclass(frozen=True)
class CommonTest:
    """The rounds in which personal models are tested on the server's test images.

    Attributes:
        every: the test takes place in evaluated rounds divisible by it, and in the last one; 0: in
            the last one only; None: never.
        is_global: whether the global model's score is the result, so that no client is asked.
        note: what was decided, why, and the key that changes it; empty if there is nothing to test.
    """

    every: int | None = None
    is_global: bool = False
    note: str = ""

    def due(self, server_round: int, last: bool) -> bool:
        """Whether the test takes place in an evaluated round.

        Args:
            server_round: the round.
            last: whether it is the last round of the run.
        """
        if self.every is None:
            return False
        return last or (self.every > 0 and server_round % self.every == 0)


@dataclass(frozen=True)
class Positions:
    """Positions that pass through the towers.

    Attributes:
        model: in `encode`, for one model.
        image: in `logits`, for one image under one model.
        private: in `logits`, for one image under every further model; it is 0 where the towers that
            run there do not depend on private tensors.
    """

    model: int
    image: int
    private: int


def decide(
    workspace: Workspace, strategy: SharedPromptStrategy, images: Sequence[int]
) -> CommonTest:
    """Decide when personal models are tested on the server's test images.

    Args:
        workspace: the server's.
        strategy: the server's strategy.
        images: number of training images of every client that may train.

    Returns:
        The decision, the same whenever it is made for the same experiment.
    """
    settings, tests = workspace.config.evaluation, len(workspace.partition.server_test)
    asked = settings.personal_on_global and "personalised" in workspace.config.protocols
    if not (asked and tests):
        return CommonTest()
    what = f"personal models on the server's {tests} test images"
    if is_common(workspace, strategy):
        chosen = settings.personal_on_global_every
        every = 1 if chosen is None else chosen
        note = f"{what}: the global model's score, since nothing is private; no client is asked"
        return CommonTest(every, is_global=True, note=f"{note} (evaluation.personal_on_global)")
    if settings.personal_on_global_every is not None:
        every = settings.personal_on_global_every
        when = f"in evaluated rounds divisible by {every} and at the end" if every else "at the end"
        return CommonTest(every, note=f"{what}: {when} ({KEY}={every})")
    return _affordable(workspace, images, tests, what)


def is_common(workspace: Workspace, strategy: SharedPromptStrategy) -> bool:
    """Whether every client's model is the global one, through the server's backbone.

    Nothing is private or sent to one client, and all keep the backbone's weights as the server.
    """
    method, seed = workspace.method, workspace.config.seed
    broadcast = type(strategy).client_shared is SharedPromptStrategy.client_shared
    return (
        method.has_global
        and broadcast
        and not workspace.config.backbone.differs
        and not method.init_private(seed, 0)
        and not workspace.extras_shapes
    )


def _affordable(workspace: Workspace, images: Sequence[int], tests: int, what: str) -> CommonTest:
    """The default: in every evaluated round, else at the end, else not at all."""
    settings, rounds = workspace.config.evaluation, workspace.config.federation.rounds
    clients = workspace.num_clients
    each_time = clients if settings.clients == "all" else workspace.round_size
    positions = count_positions(workspace)
    per_round = TRAINING_PASSES * _training_positions(workspace, positions, images)

    def costs(models: int) -> int:
        return models * tests * positions.private

    def affordable(models: int, trained_rounds: int) -> bool:
        return costs(models) <= max(FREE_POSITIONS, per_round * trained_rounds)

    if affordable(each_time, settings.every):
        why = f"{_millions(costs(each_time))} positions each time ({KEY})"
        return CommonTest(1, note=f"{what}: in every evaluated round, {why}")
    why = (
        f"{each_time} models cost {_millions(costs(each_time))} positions each time, and the "
        f"training in between {_millions(per_round * settings.every)}"
    )
    if affordable(clients, rounds):
        return CommonTest(0, note=f"{what}: at the end only, since {why} ({KEY}=1 for every time)")
    why += f"; {clients} at the end cost {_millions(costs(clients))}"
    return CommonTest(None, note=f"{what}: not tested, since {why} ({KEY}=0 for the end)")


@torch.no_grad()
def count_positions(workspace: Workspace) -> Positions:
    """Count the positions of a method with private tensors, on one of the server's test images."""
    method, clip, seed = workspace.method, workspace.clip, workspace.config.seed
    shared = method.init_shared(seed) | method.init_extras(seed)
    image = workspace.server_test()[0][:1].of_one().on(clip.device)

    def passed(models: int) -> tuple[int, int]:
        private: list[Tensors] = [method.init_private(seed, 0)] * models
        start = clip.positions_encoded
        encoded = method.encode(stack([shared], clip.device), stack(private, clip.device))
        middle = clip.positions_encoded
        method.logits(encoded, image)
        return middle - start, clip.positions_encoded - middle

    model, one = passed(1)
    # Most methods run no tower in `logits`: one model tells that, and further ones need not run.
    return Positions(model, one, passed(2)[1] - one if one else 0)


def _training_positions(workspace: Workspace, positions: Positions, images: Sequence[int]) -> int:
    """Forward positions of a round's training, for clients of average size."""
    training = workspace.config.training
    total = sum(
        local_steps(n, training) * positions.model + n * training.local_epochs * positions.image
        for n in images
    )
    return math.ceil(total / max(1, len(images)) * workspace.round_size)


def _millions(positions: int) -> str:
    return f"{positions / 1e6:.3g} M"
