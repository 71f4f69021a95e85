"""What a sweep says while it goes on: one live table in a terminal, plain lines elsewhere."""

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
from fedprompt.reports.terminal import BETWEEN, EDGES, LOOK
from fedprompt.sweeps.plan import PlannedRun
from fedprompt.sweeps.state import progress, rounds_done, seconds_left

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
RESULTS = ("global", "personal")
NUMBER = 8
"""Characters of a result's column."""
STATE = 22
"""Characters of a state that a long name leaves room for; enough for all but reasons."""
NARROW = 72
"""A terminal with fewer columns has no room for results beside states."""
COLOURS = {WAITING: "dim", RUNNING: "bold", DONE: "green", FAILED: "bold red"}


@dataclass
class _Line:
    """What is known of one run."""

    state: str = WAITING
    since: float = 0.0
    summary: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


class Board:
    """The state of every run of a sweep, and what is printed about it."""

    def __init__(self, planned: Sequence[PlannedRun], at_once: int, console: Console) -> None:
        self.console = console
        self._planned = planned
        self._at_once = at_once
        self._lines = {run.name: _Line() for run in planned}
        self._left: tuple[float, float | None] = (0.0, None)

    def skip(self, run: PlannedRun) -> None:
        """It was finished before."""
        line = self._lines[run.name]
        line.state, line.summary = DONE, progress(run).summary or {}

    def start(self, run: PlannedRun) -> None:
        """It runs now."""
        line = self._lines[run.name]
        line.state, line.since = RUNNING, time.monotonic()

    def wait(self, run: PlannedRun, why: str) -> None:
        """It is to run again."""
        self._lines[run.name].state = WAITING
        self.say(f"{run.name}: {why}; it goes on from its last checkpoint")

    def finish(self, run: PlannedRun, failure: str) -> None:
        """It is complete, or failed for that reason."""
        line = self._lines[run.name]
        line.state = FAILED if failure else DONE
        line.reason, line.summary = failure, {} if failure else progress(run).summary or {}

    @property
    def failures(self) -> dict[str, str]:
        """The reason of every failed run, by name."""
        return {name: x.reason for name, x in self._lines.items() if x.state == FAILED}

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(Text(text), soft_wrap=True)
        self.console.file.flush()

    def open(self) -> None:
        """Begin to show."""

    def close(self) -> None:
        """Give the terminal back; safe to call twice."""

    def counts(self) -> str:
        """E.g. `24 runs: 5 done, 2 running, 17 waiting, 3:05 left`."""
        found = Counter(line.state for line in self._lines.values())
        parts = [
            f"{found[state]} {state}" for state in (DONE, RUNNING, WAITING, FAILED) if found[state]
        ]
        left = self._seconds_left()
        if left is not None and found[RUNNING] + found[WAITING]:
            parts.append(f"about {human_time(left)} left")
        return f"{len(self._lines)} runs: {', '.join(parts)}"

    def _seconds_left(self) -> float | None:
        # Every folder is looked at, so not more than once in five seconds.
        at, _ = self._left
        if not at or time.monotonic() - at > 5:
            still = [r for r in self._planned if self._lines[r.name].state != FAILED]
            self._left = time.monotonic(), seconds_left(still, self._at_once)
        return self._left[1]


class PlainBoard(Board):
    """A line when a run starts, is complete or fails."""

    def start(self, run: PlannedRun) -> None:
        """Print that it runs."""
        super().start(run)
        begun = rounds_done(run.folder)
        self.say(f"start  {run.name}{f', from round {begun}' if begun else ''}")

    def finish(self, run: PlannedRun, failure: str) -> None:
        """Print how it ended."""
        super().finish(run, failure)
        line = self._lines[run.name]
        if failure:
            self.say(f"FAILED {run.name}: {failure}")
            return
        took = human_time(time.monotonic() - line.since)
        numbers = "  ".join(f"{name} {value}" for name, value in _results(line.summary))
        self.say(f"done   {run.name}  {numbers}  took {took}  ({self.counts()})")


class LiveBoard(Board):
    """One table, drawn anew every second: what runs, what failed, what ended last."""

    def __init__(self, planned: Sequence[PlannedRun], at_once: int, console: Console) -> None:
        super().__init__(planned, at_once, console)
        self._live = Live(
            get_renderable=self.table, console=console, refresh_per_second=1, transient=True
        )

    def open(self) -> None:
        """Take the terminal."""
        self._live.start()

    def close(self) -> None:
        """Give it back."""
        self._live.stop()

    def table(self) -> Table:
        """As many runs as the terminal has lines for; those that run come first.

        Long names lose their middle and long reasons their end; both are printed whole when a run
        fails. A narrow terminal has results in the column of states.
        """
        shown = self._shown(max(3, self.console.height - 6))
        states = [self._state(run) for run in shown]
        results = [[v for _, v in _results(self._lines[run.name].summary)] for run in shown]
        apart = self.console.width >= NARROW
        if not apart:
            states = [" ".join(r) or state for r, state in zip(results, states, strict=True)]
        room = self.console.width - EDGES - (2 * (BETWEEN + NUMBER) if apart else 0) - BETWEEN
        names = [run.name.rpartition("-")[0] for run in shown]  # without the hash
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
            done = max(0, rounds_done(run.folder) - 1)
            took = human_time(time.monotonic() - line.since)
            return f"round {done}/{run.config.federation.rounds}, {took}"
        return f"failed: {line.reason}" if line.state == FAILED else line.state

    def _shown(self, most: int) -> list[PlannedRun]:
        order = {RUNNING: 0, FAILED: 1, DONE: 2, WAITING: 3}
        if len(self._planned) <= most:
            return list(self._planned)
        # Later ones first among those that are done: the last to end is of most interest.
        ranked = sorted(
            enumerate(self._planned),
            key=lambda item: (
                order[self._lines[item[1].name].state],
                -self._lines[item[1].name].since,
                item[0],
            ),
        )
        return [run for _, run in sorted(ranked[:most])]


def make_board(planned: Sequence[PlannedRun], at_once: int) -> Board:
    """A live table in a terminal, plain lines in a file or pipe."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    console = Console(highlight=False)
    # isatty, not console.is_terminal: FORCE_COLOR makes rich take a pipe for a terminal.
    live = sys.stdout.isatty() and not console.is_dumb_terminal
    return (LiveBoard if live else PlainBoard)(planned, at_once, console)


def _results(summary: dict[str, Any]) -> list[tuple[str, str]]:
    if not summary:
        return []
    whole, own = summary.get("global") or {}, summary.get("personal") or {}
    values = percent(whole.get("accuracy")), percent(own.get("mean"))
    return list(zip(RESULTS, values, strict=True))


def _middle(name: str, width: int) -> str:
    """A name without its middle where it is too long: values and the seed stand at its end."""
    if len(name) <= width:
        return name
    end = (width - 1) * 2 // 3
    return f"{name[: width - 1 - end]}…{name[-end:]}"
