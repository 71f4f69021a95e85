"""Two sweeps share a folder: a run that the other one executes is busy, and has not failed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

from fedprompt.experiment.run_folder import LOCK
from fedprompt.experiment.workspaces import ResourceCache
from fedprompt.reports.run_data import SUMMARY
from fedprompt.sweeps import run as sweep_run
from fedprompt.sweeps.live import PlainBoard
from fedprompt.sweeps.plan import PlannedRun
from fedprompt.sweeps.run import run_serial
from fedprompt.sweeps.worker import Outcome, complete
from tests.support.sweeps import plan


class Other:
    """Another process, which holds the folder of a run until it ends.

    Args:
        run: the run.
        completes: whether it completes the run.
    """

    def __init__(self, run: PlannedRun, *, completes: bool) -> None:
        self.run, self.completes, self.looks = run, completes, 0
        run.folder.mkdir(parents=True)
        self.lock = FileLock(run.folder / LOCK)
        self.lock.acquire()

    def end_at_the_second_look(self, seconds: float) -> None:
        self.looks += 1
        if self.looks == 2:
            if self.completes:
                (self.run.folder / SUMMARY).write_text(json.dumps({"wall_s": 1.0}))
            self.lock.release()


@pytest.mark.parametrize("completes", [True, False])
def test_a_busy_run_is_left_to_its_process_and_looked_at_again(
    completes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = plan(tmp_path)
    assert len(runs) >= 2
    done: list[str] = []

    def completed(config: object, *_: object) -> Outcome:
        done.append(next(run.name for run in runs if run.config is config))
        return Outcome("")

    monkeypatch.setattr(sweep_run, "complete", completed)
    other = Other(runs[0], completes=completes)
    monkeypatch.setattr(sweep_run.time, "sleep", other.end_at_the_second_look)
    console = Console(file=io.StringIO(), width=200)
    board = PlainBoard(runs, 1, console)
    run_serial(runs, board)
    assert done == [run.name for run in runs[1:]] + ([] if completes else [runs[0].name])
    assert board.failures == {}
    assert f"{len(runs)} done" in board.counts()
    assert isinstance(console.file, io.StringIO)
    lines = [x for x in console.file.getvalue().splitlines() if x.startswith("busy")]
    assert len(lines) == 1, "not once per look"
    assert runs[0].name in lines[0]


def test_a_run_that_becomes_busy_when_it_starts_has_not_failed(tmp_path: Path) -> None:
    run = plan(tmp_path)[0]
    other = Other(run, completes=False)
    assert complete(run.config, ResourceCache(), 1) == Outcome("", busy=True)
    other.lock.release()
