"""Executes one run of a sweep in this process, and the Ray actor that executes one after another.

Ray imports this module in a fresh process. PyTorch and other libraries read environment variables
when they are imported, so `set_defaults` must run first, and they are imported inside functions
(see fedprompt/simulation/ray_worker.py).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from fedprompt.runtime import set_defaults

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fedprompt.config.schema import Config
    from fedprompt.experiment.workspaces import ResourceCache


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        failure: empty if the run is complete, else the reason in one line.
        busy: whether it was not touched, because another process is executing it.
    """

    failure: str
    busy: bool = False


class SweepWorker:
    """The Ray actor: executes one run at a time, keeping backbone and data sets open in between."""

    def __init__(self) -> None:
        set_defaults()
        self._opened: ResourceCache | None = None

    def placed(self, directory: str, marker: str) -> str:
        """Change to the driver's working directory and check that this node sees the sweep's files.

        Args:
            directory: The driver's working directory, so that relative paths in a config mean the
                same files here. A node that lacks it keeps its own.
            marker: The path of the sweep's plan, which every node must be able to read.

        Returns:
            The host name of this node.

        Raises:
            FileNotFoundError: The node does not see `marker`.
        """
        if os.path.isdir(directory):
            os.chdir(directory)
        if not os.path.isfile(marker):
            raise FileNotFoundError(marker)
        return os.uname().nodename

    def run(self, config: Mapping[str, Any], threads: int) -> Outcome:
        """Start or continue a run.

        Args:
            config: The run's complete config as plain values.
            threads: The number of threads with which PyTorch starts in a fresh process.
        """
        from fedprompt.experiment.validate import validate
        from fedprompt.experiment.workspaces import ResourceCache

        self._opened = self._opened or ResourceCache()
        return complete(validate(config), self._opened, threads)


def complete(config: Config, resources: ResourceCache, threads: int) -> Outcome:
    """Start or continue one run, and report any error instead of raising it.

    Args:
        config: The complete config, with the run folder in `output.dir`.
        resources: Backbones and data sets that earlier runs in this process have opened.
        threads: The number of threads with which PyTorch starts in a fresh process. Last bits
            depend on it until `simulation.threads` takes effect.

    Returns:
        The outcome, which carries the reason if the run failed.
    """
    from pathlib import Path

    import torch
    from rich.console import Console

    from fedprompt.errors import UserError
    from fedprompt.experiment import run as experiment
    from fedprompt.experiment.display import QuietDisplay
    from fedprompt.experiment.paths import absolute
    from fedprompt.experiment.resuming import read_config
    from fedprompt.experiment.run_folder import is_held
    from fedprompt.reports.run_data import CONFIG, ERROR
    from fedprompt.runtime.device_memory import give_back
    from fedprompt.sweeps.plan import without_places

    folder, silent = Path(str(config.output.dir)), QuietDisplay(Console(quiet=True))
    # An earlier run in this process has set its own number of threads.
    torch.set_num_threads(threads)
    try:
        if (folder / CONFIG).is_file():
            # The folder's name holds only part of a hash, so the whole config is compared as well.
            # A run folder's config has absolute paths.
            if without_places(read_config(folder)) != without_places(absolute(config)):
                raise UserError(f"{folder} holds a run with another config; remove it.")
            experiment.resume(folder, silent, resources)
        else:
            experiment.run(config, silent, resources)
    except UserError as error:
        # Another process may hold the folder, or have created it just before this one.
        return Outcome("", busy=True) if is_held(folder) else Outcome(str(error))
    except Exception as error:
        return Outcome(_unexpected(error, folder))
    finally:
        # Otherwise the next run would find less free memory, form other blocks of clients, and
        # differ in its last bits from the same run in a process of its own.
        give_back()
    # The run is complete, so the traceback of an earlier attempt is outdated.
    (folder / ERROR).unlink(missing_ok=True)
    return Outcome("")


def _unexpected(error: Exception, folder: Path) -> str:
    """Write the traceback into the run folder and return the reason in one line."""
    import contextlib
    import traceback

    from fedprompt.reports.run_data import ERROR

    # The disk may be what failed; the reason is still reported then.
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ERROR).write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} (traceback: {folder / ERROR})"
