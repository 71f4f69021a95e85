"""One run of a sweep in this process, and the Ray actor that does many of them.

Ray imports this module in a bare process: what libraries read when they are loaded is set first,
and they are imported inside the methods (see fedprompt/simulation/ray_worker.py).
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

ERROR = "error.txt"
"""In the folder of a run that failed for another reason than bad input: the traceback."""
LOCK_S = 60.0
"""How long a run waits for a dying process of a killed sweep to let go of its folder."""


class Outcome(NamedTuple):
    """How a run ended: "" or the reason why it is not complete, in one line."""

    failure: str


class SweepWorker:
    """The actor: one run at a time; backbone and data sets stay open between runs."""

    def __init__(self) -> None:
        set_defaults()
        self._opened: ResourceCache | None = None

    def placed(self, directory: str, marker: str) -> str:
        """Ready, in the driver's working directory where this machine has it; its host's name.

        Raises:
            FileNotFoundError: this machine does not see `marker`, the sweep's plan.
        """
        if os.path.isdir(directory):
            os.chdir(directory)
        if not os.path.isfile(marker):
            raise FileNotFoundError(marker)
        return os.uname().nodename

    def run(self, config: Mapping[str, Any], threads: int) -> Outcome:
        """Run, or go on with, the run that `config` describes."""
        from fedprompt.experiment.validate import validate
        from fedprompt.experiment.workspaces import ResourceCache

        self._opened = self._opened or ResourceCache()
        return complete(validate(config), self._opened, threads)


def complete(config: Config, resources: ResourceCache, threads: int) -> Outcome:
    """Run, or go on with, one run; nothing it raises gets out.

    `threads` is what a fresh process would begin with: until `simulation.threads` holds, last bits
    depend on it.
    """
    import gc
    from pathlib import Path

    import torch
    from rich.console import Console

    from fedprompt.errors import UserError
    from fedprompt.experiment import run as experiment
    from fedprompt.experiment.compose import compose
    from fedprompt.experiment.display import QuietDisplay
    from fedprompt.reports.run_data import CONFIG
    from fedprompt.sweeps.plan import without_places

    folder, silent = Path(str(config.output.dir)), QuietDisplay(Console(quiet=True))
    torch.set_num_threads(threads)
    try:
        _await_folder(folder)
        if (folder / CONFIG).is_file():
            if without_places(compose(str(folder / CONFIG))) != without_places(config):
                raise UserError(f"{folder} holds a run with another config; remove it.")
            experiment.resume(folder, silent, resources)
        else:
            experiment.run(config, silent, resources)
    except UserError as error:
        return Outcome(str(error))
    except Exception as error:
        return Outcome(_unexpected(error, folder))
    finally:
        gc.collect()
    (folder / ERROR).unlink(missing_ok=True)
    return Outcome("")


def _await_folder(folder: Path) -> None:
    """Wait until no other process holds the run folder, if there is one."""
    from filelock import FileLock, Timeout

    from fedprompt.errors import UserError

    if not folder.is_dir():
        return
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=LOCK_S)
    except Timeout:
        raise UserError(f"{folder} is in use by another process.") from None
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}.") from None
    lock.release()


def _unexpected(error: Exception, folder: Path) -> str:
    """The reason in one line; the traceback goes into the run folder."""
    import contextlib
    import traceback

    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ERROR).write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} (traceback: {folder / ERROR})"
