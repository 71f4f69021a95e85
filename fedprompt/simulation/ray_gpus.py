"""How many GPUs, or which fraction of one, a Ray worker reserves.

Ray gives every actor the cards that it has reserved and hides the others from it, so an actor finds
its card as the only one. A share never spans two cards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedprompt.config.schema import SimulationConfig
from fedprompt.errors import UserError

ROUNDING = 1e-9
"""Added before rounding down: 1 / (1 / 3) may be a little less than 3."""


def gpus_per_worker(config: SimulationConfig, device: str, cards: Sequence[int]) -> float:
    """The GPUs that one worker reserves: `simulation.gpus_per_worker`, or an even share.

    Args:
        config: the `simulation` section.
        device: `backbone.device`.
        cards: the number of GPUs of each machine.

    Returns:
        A number from 0, if the workers compute on CPUs, to 1.

    Raises:
        UserError: the config asks for a share that it does not use, or that does not exist, or for
            more workers than the cards can hold.
    """
    asked, workers, total = config.gpus_per_worker, config.workers, sum(cards)
    if device not in ("auto", "cuda"):
        if asked:
            raise UserError(
                f"simulation.gpus_per_worker={asked:g} reserves GPUs that backbone.device={device} "
                "does not use; leave one of them out."
            )
        return 0.0
    if asked == 0 and (total or device == "cuda"):
        raise UserError(
            "simulation.gpus_per_worker=0 leaves the workers without a GPU, but backbone.device is "
            f"'{device}'; leave it out to share the GPUs evenly, or set backbone.device=cpu."
        )
    if asked and not total:
        raise UserError(f"simulation.gpus_per_worker={asked:g} is set, but PyTorch sees no GPU.")
    if asked is None:
        # As many workers on each card as are needed for all of them to have a place.
        return 1 / math.ceil(workers / total) if total else 0.0
    room = total * int(1 / asked + ROUNDING) if asked else workers
    if workers > room:
        raise UserError(
            f"simulation.workers={workers} with simulation.gpus_per_worker={asked:g} do not fit: "
            f"{total} GPU{'s' * (total != 1)} hold{'s' * (total == 1)} {room}; set "
            f"simulation.workers={room}, or leave out gpus_per_worker to share the GPUs evenly."
        )
    return asked
