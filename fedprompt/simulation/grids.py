"""Opening the grid of a simulation, which runs its clients in this process or on Ray."""

from __future__ import annotations

import importlib

from fedprompt.config.schema import Config
from fedprompt.federation.client_app import handle
from fedprompt.runtime import cards
from fedprompt.simulation import attacks, backdoor
from fedprompt.simulation.block_grid import BlockGrid, Opener, PrivateStore
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.simulation.ray_gpus import gpus_per_worker
from fedprompt.workspace import Workspace


def check_grid(config: Config) -> None:
    """Refuse shares of GPUs that this machine does not have, before anything is opened.

    What a Ray cluster has is known, and checked, only once the grid has joined it.

    Args:
        config: the experiment; its `simulation` and `backbone` sections are used.

    Raises:
        UserError: `ray_gpus.gpus_per_worker` raises it.
    """
    if config.simulation.kind == "ray" and not config.simulation.ray_address:
        gpus_per_worker(config.simulation, config.backbone.device, [cards.count()])


def open_grid(
    config: Config,
    workspace: Workspace,
    opener: Opener,
    private: PrivateStore | None = None,
) -> BlockGrid:
    """Open the grid that `simulation.kind` names.

    Args:
        config: the experiment; its `simulation` and `attack` sections are used.
        workspace: the workspace of this process.
        opener: the function that opens the workspace of a config in a Ray worker. It must be an
            importable function or a `functools.partial` of one, since Ray pickles it by reference.
        private: the store of the clients' private tensors; they stay in memory if it is None.

    Returns:
        The grid, which the caller must close.

    Raises:
        UserError: Ray or its workers do not start, or the method cannot have the backdoor that
            attackers are to plant.
    """
    if config.attack.kind == "backdoor":
        backdoor.check(workspace)
    answer = handle if config.attack.kind == "none" else attacks.handle
    if config.simulation.kind == "inline":
        return InlineGrid(workspace, private, answer=answer)
    # Imported only here, since importing Ray takes about a second.
    ray_grid = importlib.import_module("fedprompt.simulation.ray_grid")
    grid: BlockGrid = ray_grid.RayGrid(workspace, private, answer=answer, opener=opener)
    return grid
