"""Weights & Biases: one W&B run for each of our runs, in the project `fedprompt`.

`WANDB_PROJECT` selects another project. W&B itself decides whether it is online (`wandb login`,
`WANDB_MODE=offline`); its files are in the run folder. An offline W&B run cannot be asked what it
contains, so the run folder records how many lines have been logged.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from fedprompt.config.schema import Config, to_dict
from fedprompt.experiment.trackers.base import Point, RunLogger
from fedprompt.experiment.trackers.state import read_state, write_state


class WandB(RunLogger):
    """One row per metrics line, plotted over `round`; the config; the summary."""

    name: ClassVar[str] = "wandb"
    needs: ClassVar[tuple[str, ...]] = ("wandb",)

    def __init__(self, folder: Path, config: Config) -> None:
        import wandb

        state = read_state(folder, self.name)
        self._folder = folder
        self._id = str(state.get("run") or secrets.token_hex(8))
        self._next = int(state.get("next", 0))
        self._finished = False
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "fedprompt",
            name=folder.name,
            id=self._id,
            resume="allow",
            dir=str(folder),
            config=to_dict(config),
            # Otherwise W&B captures stdout and stderr, and with them the progress display.
            settings=wandb.Settings(console="off"),
        )
        # W&B's step is the index of a line, so charts need the round as their horizontal axis.
        self._run.define_metric("round")
        self._run.define_metric("*", step_metric="round")
        self._keep()

    def add(self, point: Point) -> None:
        """Log one row. W&B's step must increase, so it is the point's place, not its round."""
        if point.place < self._next:
            return
        self._run.log({"round": point.server_round, **point.metrics}, step=point.place, commit=True)
        self._next = point.place + 1
        self._keep()

    def finish(self, summary: Mapping[str, float]) -> None:
        """Write the numbers of the summary into W&B's own summary."""
        self._run.summary.update({f"final/{name}": value for name, value in summary.items()})
        self._finished = True

    def close(self) -> None:
        """End the W&B run, with exit code 1 if it was not finished."""
        self._run.finish(exit_code=0 if self._finished else 1)

    def _keep(self) -> None:
        write_state(self._folder, self.name, {"run": self._id, "next": self._next})
