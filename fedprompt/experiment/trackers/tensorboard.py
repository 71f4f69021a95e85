"""TensorBoard: event files in the run folder. `tensorboard --logdir runs` shows all runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from fedprompt.config.schema import Config, to_yaml
from fedprompt.experiment.trackers.base import Point, SteppedLogger, parameters

FOLDER = "tensorboard"


class TensorBoard(SteppedLogger):
    """Scalars per round; the config as text and, at the end of the run, as hyper-parameters."""

    name: ClassVar[str] = "tensorboard"
    needs: ClassVar[tuple[str, ...]] = ("tensorboard",)

    def __init__(self, folder: Path, config: Config) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter

        self._config = config
        path = folder / FOLDER
        self._seen = {}
        begun = path.is_dir() and any(path.iterdir())
        if begun:
            # Size 0 loads all scalars; by default the accumulator keeps a random sample of them.
            held = EventAccumulator(str(path), size_guidance={"scalars": 0})
            held.Reload()
            for tag in held.Tags()["scalars"]:
                self._seen[tag] = {event.step for event in held.Scalars(tag)}
        self._writer = SummaryWriter(str(path))
        if not begun:
            text = "".join(f"    {line}\n" for line in to_yaml(config).splitlines())
            self._writer.add_text("config", text)
            self._writer.flush()

    def write(self, metrics: Mapping[str, float], server_round: int) -> None:
        """Write one scalar per metric."""
        now = time.time()
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, server_round, now)
        self._writer.flush()

    def finish(self, summary: Mapping[str, float]) -> None:
        """Write the summary as scalars of the last round, and a line in the HPARAMS tab."""
        from torch.utils.tensorboard.summary import hparams

        final = {f"final/{name}": value for name, value in summary.items()}
        rounds = self._config.federation.rounds
        if not set(final) <= set(self._seen):
            self.add(Point(rounds, rounds, final))
            # `SummaryWriter.add_hparams` would write the line into another folder, as a run of its
            # own.
            for part in hparams(parameters(self._config), final):
                self._writer._get_file_writer().add_summary(part)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
