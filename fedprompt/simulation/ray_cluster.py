"""Starting or joining Ray, and the memory of its workers; runs in the server's process."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ray

from fedprompt.config.schema import SimulationConfig
from fedprompt.errors import UserError
from fedprompt.runtime.endings import restore_handlers
from fedprompt.simulation.ray_worker import Place


def start_ray(config: SimulationConfig, gpus: int = 0) -> None:
    """Start Ray on this machine, or join the cluster at `simulation.ray_address`.

    Args:
        config: the `simulation` section.
        gpus: number of GPUs that Ray deals out to its actors; a cluster knows its own.

    Raises:
        UserError: Ray does not start, or the cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray hides all GPUs from actors that reserve none, and warns that this will change. With 0 it
    # leaves them visible: actors reserve none only if they are to compute on a CPU anyway.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if config.ray_address:
        options["address"] = config.ray_address
    else:
        cpus = math.ceil(config.workers * config.cpus_per_worker)
        # "local" starts a new Ray even if another one is running on this machine.
        options |= {"address": "local", "num_cpus": cpus, "num_gpus": gpus}
        options["include_dashboard"] = False
    try:
        ray.init(**options)
    except Exception as error:  # `ray.init` raises errors of many types
        where = config.ray_address or "this machine"
        raise UserError(f"grid: cannot start or join Ray on {where}: {brief(error)}") from None
    finally:
        # Ray has replaced the handler of SIGTERM by its own, which prints its C++ stack.
        restore_handlers()


def free_bytes_per_worker(places: Sequence[Place]) -> float:
    """Free memory of the worker that has the least of it.

    Args:
        places: where each worker runs. Workers in the same memory share it evenly.

    Returns:
        Bytes per worker. The smallest value counts, as all blocks have the same size.
    """
    sharing = Counter(place.memory for place in places)
    return min(place.free_bytes / sharing[place.memory] for place in places)


LONGEST_REASON = 300
"""How much of a long error is shown, in characters."""


def brief(error: BaseException) -> str:
    """The end of an error's text on one line: in Ray's long errors the reason comes last."""
    text = " ".join(str(error).replace("^", "").split())
    if len(text) <= LONGEST_REASON:
        return text
    # Cut between words.
    return f"... {text[-LONGEST_REASON:].partition(' ')[2]}"
