"""Weights & Biases: one W&B run per run, in the project `fedprompt` or the one of `WANDB_PROJECT`.

Whether it is online is W&B's own business (`wandb login`, `WANDB_MODE=offline`); its files lie in
the run's folder. W&B cannot be asked offline what it holds, so the run's folder keeps how far its
log has come.
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
    """A row per metrics line, drawn over `round`; the config; the summary."""

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
            settings=wandb.Settings(console="off"),
        )
        self._run.define_metric("round")
        self._run.define_metric("*", step_metric="round")
        self._keep()

    def add(self, point: Point) -> None:
        """One row; W&B's step is the line's place, which only grows."""
        if point.place < self._next:
            return
        self._run.log({"round": point.server_round, **point.metrics}, step=point.place, commit=True)
        self._next = point.place + 1
        self._keep()

    def finish(self, summary: Mapping[str, float]) -> None:
        """The summary's numbers as W&B's own summary."""
        self._run.summary.update({f"final/{name}": value for name, value in summary.items()})
        self._finished = True

    def close(self) -> None:
        """End the W&B run; with exit code 1 where it was not finished."""
        self._run.finish(exit_code=0 if self._finished else 1)

    def _keep(self) -> None:
        write_state(self._folder, self.name, {"run": self._id, "next": self._next})
