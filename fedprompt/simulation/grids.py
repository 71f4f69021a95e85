"""Opening the grid of a simulation: clients in this process, or on Ray."""

from __future__ import annotations

import importlib

from fedprompt.config.schema import Config
from fedprompt.federation.client_app import handle
from fedprompt.simulation import attacks
from fedprompt.simulation.block_grid import BlockGrid, Opener, PrivateStore
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.workspace import Workspace


def open_grid(
    config: Config,
    workspace: Workspace,
    opener: Opener,
    private: PrivateStore | None = None,
) -> BlockGrid:
    """The grid that `simulation.kind` names.

    Args:
        config: the experiment; its `simulation` and `attack` sections decide.
        workspace: what this process holds.
        opener: opens the workspace of a config in a Ray worker; an importable function or a
            `functools.partial` of one, since Ray pickles it by reference.
        private: keeps the clients' private tensors; memory, where it is None.

    Returns:
        The grid; the caller closes it.

    Raises:
        UserError: Ray or its workers do not start.
    """
    answer = handle if config.attack.kind == "none" else attacks.handle
    if config.simulation.kind == "inline":
        return InlineGrid(workspace, private, answer=answer)
    # By name, since importing Ray takes a second that runs without it should not pay.
    ray_grid = importlib.import_module("fedprompt.simulation.ray_grid")
    grid: BlockGrid = ray_grid.RayGrid(workspace, private, answer=answer, opener=opener)
    return grid
