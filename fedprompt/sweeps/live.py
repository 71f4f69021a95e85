"""Progress output of a sweep: a live table in a terminal, one line per event elsewhere.

A board is updated by the process that drives the sweep. It learns how far the runs are from their
folders, so workers do not send progress messages.
"""

from __future__ import annotations

import io
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from fedprompt.reports.format import MISSING, human_time, percent
from fedprompt.reports.marks import mark_line
from fedprompt.reports.terminal import BETWEEN, EDGES, LOOK
from fedprompt.sweeps.plan import PlannedRun
from fedprompt.sweeps.state import Progress, progress, rounds_done, seconds_left

WAITING, RUNNING, BUSY, DONE, FAILED = "waiting", "running", "busy", "done", "failed"
"""States of a run; it is busy while another process executes it."""
RESULTS = ("global", "personal")
NUMBER = 8
"""Width of a result column, in characters."""
STATE = 22
"""Width that long run names leave for the state, in characters. Every state but a reason fits."""
NARROW = 72
"""In a terminal with fewer columns than this, results share the column of states."""
COUNTED = (DONE, RUNNING, BUSY, WAITING, FAILED)
COLOURS = {WAITING: "dim", RUNNING: "bold", BUSY: "dim", DONE: "green", FAILED: "bold red"}


@dataclass
class _Line:
    """What the board knows about one run; `since` is the monotonic time in seconds at its start."""

    state: str = WAITING
    since: float = 0.0
    summary: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


class Board:
    """The state of every run of a sweep, and the output about it.

    Args:
        planned: The runs of the sweep, complete ones included.
        at_once: How many runs execute at the same time, for the estimate of the remaining time.
        console: Where to print.
    """

    def __init__(self, planned: Sequence[PlannedRun], at_once: int, console: Console) -> None:
        """Start with every run in the state of waiting."""
        self.console = console
        self._planned = planned
        self._at_once = at_once
        self._lines = {run.name: _Line() for run in planned}
        # By run, its state on the board and on disk when its folder was last read.
        self._read: dict[str, tuple[str, Progress]] = {}
        self._left: tuple[float, float | None] = (0.0, None)

    def skip(self, run: PlannedRun) -> None:
        """Record that the run was complete before the sweep started."""
        line = self._lines[run.name]
        line.state, line.summary = DONE, progress(run).summary or {}

    def start(self, run: PlannedRun) -> None:
        """Record that the run has started."""
        line = self._lines[run.name]
        line.state, line.since = RUNNING, time.monotonic()

    def wait(self, run: PlannedRun, why: str) -> None:
        """Record that the run was interrupted and will be continued from its last checkpoint."""
        self._lines[run.name].state = WAITING
        self.say(f"{run.name}: {why}; it goes on from its last checkpoint")

    def defer(self, run: PlannedRun) -> None:
        """Record that another process is executing the run, which is looked at again later."""
        line = self._lines[run.name]
        if line.state != BUSY:
            self.say(f"busy   {run.name}: another process is executing it")
        line.state = BUSY

    def is_busy(self, run: PlannedRun) -> bool:
        """Whether the run was deferred, and has neither started nor ended here since."""
        return self._lines[run.name].state == BUSY

    def finish(self, run: PlannedRun, failure: str) -> None:
        """Record that the run has ended.

        Args:
            run: The run.
            failure: The reason why it failed, in one line; empty if it is complete.
        """
        line = self._lines[run.name]
        line.state = FAILED if failure else DONE
        line.reason, line.summary = failure, {} if failure else progress(run).summary or {}

    @property
    def failures(self) -> dict[str, str]:
        """The reason why each failed run failed, by the run's name."""
        return {name: x.reason for name, x in self._lines.items() if x.state == FAILED}

    def say(self, text: str) -> None:
        """Print one line that remains above any live output."""
        self.console.print(Text(text), soft_wrap=True)
        # Python buffers the output to a file or pipe in blocks; without this, a log would lag
        # behind.
        self.console.file.flush()

    def open(self) -> None:
        """Start the live output, if there is any."""

    def close(self) -> None:
        """Stop the live output and release the terminal. It is safe to call this twice."""

    def counts(self) -> str:
        """Return a summary such as `24 runs: 5 done, 2 running, 17 waiting, about 3:05 left`."""
        found = Counter(line.state for line in self._lines.values())
        parts = [f"{found[state]} {state}" for state in COUNTED if found[state]]
        left = self._seconds_left()
        if left is not None and found[RUNNING] + found[BUSY] + found[WAITING]:
            parts.append(f"about {human_time(left)} left")
        return f"{len(self._lines)} runs: {', '.join(parts)}"

    def _progress(self, run: PlannedRun) -> Progress:
        """The state of a run; the folders of runs that do not execute are read only once."""
        state = self._lines[run.name].state
        known = self._read.get(run.name)
        if known is None or known[0] != state or state == RUNNING:
            known = self._read[run.name] = state, progress(run)
        return known[1]

    def _seconds_left(self) -> float | None:
        # The estimate reads files of every run folder, while the live table asks for it every
        # second.
        at, _ = self._left
        if not at or time.monotonic() - at > 5:
            still = [r for r in self._planned if self._lines[r.name].state != FAILED]
            self._left = time.monotonic(), seconds_left(still, self._at_once, self._progress)
        return self._left[1]


class PlainBoard(Board):
    """A board that prints one line when a run starts, completes or fails."""

    def start(self, run: PlannedRun) -> None:
        """Print that the run has started, and from which round if it is continued."""
        super().start(run)
        begun = rounds_done(run.folder)
        self.say(f"start  {run.name}{f', from round {begun}' if begun else ''}")

    def finish(self, run: PlannedRun, failure: str) -> None:
        """Print the results of a complete run, or the reason why the run failed."""
        super().finish(run, failure)
        line = self._lines[run.name]
        if failure:
            self.say(f"FAILED {run.name}: {failure}")
            return
        took = human_time(time.monotonic() - line.since)
        numbers = _tried(line.summary) or "  ".join(
            f"{name} {value}" for name, value in _results(line.summary)
        )
        self.say(f"done   {run.name}  {numbers}  took {took}  ({self.counts()})")
        if mark := mark_line(line.summary):
            self.say(f"       {run.name}: {mark}")


class LiveBoard(Board):
    """A board that redraws one table every second, with running and failed runs first."""

    def __init__(self, planned: Sequence[PlannedRun], at_once: int, console: Console) -> None:
        super().__init__(planned, at_once, console)
        # Passing the function, not a table, makes rich ask for fresh contents at every refresh.
        self._live = Live(
            get_renderable=self.table, console=console, refresh_per_second=1, transient=True
        )

    def open(self) -> None:
        """Start the live table."""
        self._live.start()

    def close(self) -> None:
        """Remove the live table and restore the terminal."""
        self._live.stop()

    def table(self) -> Table:
        """Build a table of as many runs as the terminal has lines for, running ones first.

        Long names are shortened in the middle and long reasons at the end. Both are printed in full
        in the list of failures when the sweep ends. In a narrow terminal, results replace the
        state.
        """
        # Six lines for the title, the head and the margins; rich cuts off a live table that is too
        # tall.
        shown = self._shown(max(3, self.console.height - 6))
        states = [self._state(run) for run in shown]
        results = [[v for _, v in _results(self._lines[run.name].summary)] for run in shown]
        apart = self.console.width >= NARROW
        if not apart:
            states = [" ".join(r) or state for r, state in zip(results, states, strict=True)]
        room = self.console.width - EDGES - (2 * (BETWEEN + NUMBER) if apart else 0) - BETWEEN
        names = [run.name.rpartition("-")[0] for run in shown]  # without the hash
        # The name gets half of the width at least, and whatever the states do not need.
        needed = min(STATE, max(map(len, states)))
        wide = min(max(map(len, names)), max(room // 2, room - needed))
        table = Table(
            Column("run", no_wrap=True, width=wide),
            Column(
                "state" if apart else "state or results",
                no_wrap=True,
                overflow="ellipsis",
                max_width=room - wide,
            ),
            *(Column(name, justify="right", width=NUMBER) for name in RESULTS if apart),
            title=Text(self.counts()),
            title_justify="left",
            **LOOK,
        )
        for run, name, state, numbers in zip(shown, names, states, results, strict=True):
            colour = COLOURS[self._lines[run.name].state]
            cells = (numbers or [MISSING, MISSING]) if apart else []
            table.add_row(Text(_middle(name, wide)), Text(state, style=colour), *cells)
        return table

    def _state(self, run: PlannedRun) -> str:
        line = self._lines[run.name]
        if line.state == RUNNING:
            # `rounds_done` counts the evaluation before training as a round; the reader does not.
            done = max(0, rounds_done(run.folder) - 1)
            took = human_time(time.monotonic() - line.since)
            return f"round {done}/{run.config.federation.rounds}, {took}"
        if line.state == FAILED:
            return f"failed: {line.reason}"
        return _tried(line.summary) or line.state

    def _shown(self, most: int) -> list[PlannedRun]:
        order = {RUNNING: 0, FAILED: 1, BUSY: 2, DONE: 3, WAITING: 4}
        if len(self._planned) <= most:
            return list(self._planned)
        # Within a state the run that started last comes first, since its outcome is the newest.
        ranked = sorted(
            enumerate(self._planned),
            key=lambda item: (
                order[self._lines[item[1].name].state],
                -self._lines[item[1].name].since,
                item[0],
            ),
        )
        # The ranking selects runs; the table lists the selected ones in the order of the plan.
        return [run for _, run in sorted(ranked[:most])]


def make_board(planned: Sequence[PlannedRun], at_once: int) -> Board:
    """Create the board that suits stdout.

    Args:
        planned: The runs of the sweep, complete ones included.
        at_once: How many runs execute at the same time.

    Returns:
        A live table for a terminal, plain lines for a file or pipe.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # An ASCII-only stdout must not end a sweep with an encoding error because of a `±`.
        sys.stdout.reconfigure(errors="replace")
    console = Console(highlight=False)
    # isatty, not console.is_terminal: with FORCE_COLOR set, rich takes a pipe for a terminal.
    live = sys.stdout.isatty() and not console.is_dumb_terminal
    return (LiveBoard if live else PlainBoard)(planned, at_once, console)


def _results(summary: dict[str, Any]) -> list[tuple[str, str]]:
    if not summary:
        return []
    whole, own = summary.get("global") or {}, summary.get("personal") or {}
    values = percent(whole.get("accuracy")), percent(own.get("mean"))
    return list(zip(RESULTS, values, strict=True))


def _tried(summary: dict[str, Any]) -> str:
    """What the trial of a search has measured: nothing but an accuracy on validation images."""
    tried = summary.get("objective")
    tested = summary.get("personal") or (summary.get("global") or {}).get("accuracy") is not None
    return f"validation {tried['name']} {percent(tried['value'])}" if tried and not tested else ""


def _middle(name: str, width: int) -> str:
    """Shorten a name in the middle, because grid values and the seed are at its end."""
    if len(name) <= width:
        return name
    end = (width - 1) * 2 // 3
    return f"{name[: width - 1 - end]}…{name[-end:]}"
