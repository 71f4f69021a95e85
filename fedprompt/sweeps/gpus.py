"""The GPUs of a sweep's runs: how much of one a run gets, and which cards have room.

Every run is a process that sees the card it was given and no other, through the variable
CUDA_VISIBLE_DEVICES, which Ray sets. Cards whose memory is mostly taken by other programs are left
out, unless there is no other.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from fedprompt.errors import UserError
from fedprompt.runtime import cards
from fedprompt.sweeps.plan import PlannedRun, Resources

VISIBLE = "CUDA_VISIBLE_DEVICES"
FREE_SHARE = 0.5
"""A card with less free memory than this share of its total belongs to somebody else's program."""


def with_gpus(resources: Resources, runs: Sequence[PlannedRun], total: int) -> Resources:
    """Decide what `resources.gpus` leaves open: a whole card for each run, if runs use cards.

    Runs that share a card would find less free memory on it, form other blocks of clients, and
    differ in their last bits from the same run alone.

    Args:
        resources: what one run needs.
        runs: the runs.
        total: the number of GPUs on this machine or cluster.

    Returns:
        The resources with a number of GPUs.

    Raises:
        UserError: runs that compute on a GPU are given none, or there is no GPU to give.
    """
    devices = {run.config.backbone.device for run in runs}
    computing = devices & {"auto", "cuda"}
    if resources.gpus == 0 and computing and total:
        raise UserError(
            "sweep: resources.gpus=0 leaves the runs without a GPU, but backbone.device is "
            f"'{min(computing)}'; leave it out to give each run a card, or set backbone.device=cpu."
        )
    if resources.gpus and not total:
        raise UserError(f"sweep: resources.gpus={resources.gpus:g} is set, but there is no GPU.")
    if resources.gpus is not None:
        return resources
    return replace(resources, gpus=1.0 if computing and total else 0.0)


def roomy_cards() -> list[int]:
    """The cards on which runs are placed, as PyTorch numbers them."""
    found = cards.cards()
    free = [1.0 if c.free_bytes is None else c.free_bytes / c.total_bytes for c in found]
    roomy = [index for index, share in enumerate(free) if share >= FREE_SHARE]
    return roomy or [max(range(len(free)), key=free.__getitem__)] if free else []


@contextlib.contextmanager
def only_cards(chosen: Sequence[int]) -> Iterator[None]:
    """Show the processes that are started inside the block these cards alone.

    Args:
        chosen: cards as `roomy_cards` numbers them. Where the variable is set already, it lists
            the cards that are numbered.
    """
    before = os.environ.get(VISIBLE)
    names = before.split(",") if before else None
    os.environ[VISIBLE] = ",".join(names[i].strip() if names else str(i) for i in chosen)
    try:
        yield
    finally:
        if before is None:
            del os.environ[VISIBLE]
        else:
            os.environ[VISIBLE] = before


def use_roomiest_card() -> None:
    """Let this process, in which CUDA may have started already, compute on a card with room."""
    if chosen := roomy_cards():
        torch.cuda.set_device(chosen[0])
