"""The grids of a simulation by name: `<kind>_grid.py` holds the one of `simulation.kind`."""

from __future__ import annotations

import importlib

from fedprompt.config.schema import Config
from fedprompt.federation.client_app import handle
from fedprompt.simulation import attacks
from fedprompt.simulation.block_grid import BlockGrid, PrivateStore
from fedprompt.workspace import Workspace


def open_grid(
    config: Config, workspace: Workspace, private: PrivateStore | None = None
) -> BlockGrid:
    """The grid that `config.simulation.kind` names; Ray is imported only where it is asked for."""
    answer = handle if config.attack.kind == "none" else attacks.handle
    module = importlib.import_module(f"fedprompt.simulation.{config.simulation.kind}_grid")
    grid: BlockGrid = module.Grid(workspace, private, answer=answer)
    return grid
