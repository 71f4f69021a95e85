"""Progress output of a run, and the tables that it prints at the end.

The display is called by the process that runs the rounds (the server of a simulation, or the
operator's command in a deployment). A terminal shows one live block with a bar, loss, accuracies,
traffic and time left; a file or a pipe gets one plain line per round in a fixed format; `quiet`
prints the result only. Text that comes from a run (names, paths, messages) is never interpreted as
rich markup.
"""

from __future__ import annotations

import atexit
import io
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from fedprompt.reports.format import MISSING, Table, human_bytes, human_time, percent, plural
from fedprompt.reports.result_tables import protocol_tables, summary_table


class Display(Protocol):
    """What a run calls to report its progress. No call blocks."""

    def start(self, title: str, rounds: int, first_round: int) -> None:
        """Report that the rounds begin.

        Args:
            title: The name of the run.
            rounds: The number of rounds of the whole run.
            first_round: The next round; greater than 1 if the run continues from a checkpoint.
        """

    def message(self, text: str) -> None:
        """Show one line to the user."""

    def phase(self, text: str) -> None:
        """Show what the run is doing now, e.g. `encoding images`."""

    def round(self, record: Mapping[str, Any], eta_s: float | None) -> None:
        """Report that a round has ended.

        Traffic is shown as the total since the start of the run. A record may carry the total as
        `total_bytes_up` and `total_bytes_down`; otherwise `bytes_up` and `bytes_down` of the
        records seen so far are added up.

        Args:
            record: The round's line of `metrics.jsonl`.
            eta_s: The expected time left in seconds, None if it is not known yet.
        """

    def finish(
        self,
        summary: Mapping[str, Any],
        run_dir: Path | str | None = None,
        tables: Sequence[Table] = (),
    ) -> None:
        """Report that the run is complete: show its results, then its folder.

        The tables are arguments because building them requires the protocols and thus PyTorch,
        while a display is shown before PyTorch is imported.

        Args:
            summary: The content of `summary.json`.
            run_dir: The run folder to name; None names none.
            tables: The tables of the run's evaluation protocols.
        """

    def close(self) -> None:
        """Release the terminal. It is safe to call this twice and after an error."""


def _plain(text: str) -> Text:
    """Return text that rich prints unchanged: `[red]` in a name remains six characters."""
    return Text(text)


class _Traffic:
    """Bytes sent up and down since the start of the run."""

    def __init__(self) -> None:
        self.up = self.down = 0

    def add(self, record: Mapping[str, Any]) -> None:
        self.up = record.get("total_bytes_up", self.up + (record.get("bytes_up") or 0))
        self.down = record.get("total_bytes_down", self.down + (record.get("bytes_down") or 0))


def _label(record: Mapping[str, Any]) -> str:
    return "local-only" if record.get("kind") == "local_only" else "round"


def _fields(
    record: Mapping[str, Any], traffic: _Traffic, eta_s: float | None
) -> Iterator[tuple[str, str]]:
    """Yield the name and the value of everything that is shown for one round, in display order."""
    loss = (record.get("train") or {}).get("loss")
    yield "loss", MISSING if loss is None else f"{loss:.3f}"
    yield "global", percent((record.get("global") or {}).get("accuracy"))
    yield "personal", percent((record.get("personal") or {}).get("mean"))
    if "backdoor" in record:
        yield "attack success", percent((record["backdoor"] or {}).get("success"))
    yield "up", human_bytes(traffic.up)
    yield "down", human_bytes(traffic.down)
    rejected = (record.get("clients") or {}).get("rejected")
    if rejected:
        yield "rejected", str(rejected)
    known = eta_s is not None and math.isfinite(eta_s)
    yield "left", human_time(eta_s) if known and eta_s is not None else MISSING


def _print_summary(
    console: Console,
    summary: Mapping[str, Any],
    run_dir: Path | str | None,
    tables: Sequence[Table],
) -> None:
    console.print(summary_table(summary, console.width))
    for table in protocol_tables(tables, console.width):
        console.print(table)
    if run_dir is not None:
        # Not in the table's caption, where it would be wrapped and hard to copy.
        console.print(_plain(f"run folder: {run_dir}"), soft_wrap=True)


class PlainDisplay:
    """Prints one line per round, for files, pipes and logs.

    `round 3/10  loss 1.234  global 61.2 %  personal 78.9 %  up 80.0 KiB  down 80.0 KiB  left 0:12`
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, force_terminal=False, color_system=None)
        self._traffic = _Traffic()
        self._rounds = 0

    def start(self, title: str, rounds: int, first_round: int) -> None:
        """Print the title and the number of rounds."""
        self._traffic, self._rounds = _Traffic(), rounds
        resumed = f", going on from round {first_round}" if first_round > 1 else ""
        self._print(f"{title}: {plural(rounds, 'round')}{resumed}")

    def message(self, text: str) -> None:
        """Print the line."""
        self._print(text)

    def phase(self, text: str) -> None:
        """Print the phase as a line."""
        self._print(f"{text} ...")

    def round(self, record: Mapping[str, Any], eta_s: float | None) -> None:
        """Print one line for the round."""
        self._traffic.add(record)
        fields = (f"{name} {value}" for name, value in _fields(record, self._traffic, eta_s))
        self._print("  ".join((f"{_label(record)} {record['round']}/{self._rounds}", *fields)))

    def finish(
        self,
        summary: Mapping[str, Any],
        run_dir: Path | str | None = None,
        tables: Sequence[Table] = (),
    ) -> None:
        """Print the summary table, the tables of protocols and the run folder."""
        _print_summary(self._console, summary, run_dir, tables)

    def close(self) -> None:
        """Do nothing, since this display does not change the terminal."""

    def _print(self, text: str) -> None:
        # soft_wrap: a line of the log stays one line, whatever width rich assumes for the file.
        self._console.print(_plain(text), soft_wrap=True)
        # A pipe or file is buffered in blocks; without this, a followed log would lag behind.
        self._console.file.flush()


class RichDisplay:
    """Shows one live block in a terminal: a bar over the rounds, and the last round's numbers."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._traffic = _Traffic()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}", markup=False),
            console=self._console,
            expand=True,
        )
        # Without a total the bar pulses, which is how a phase before the first round looks.
        self._task = self._progress.add_task("", total=None, count="")
        self._live: Live | None = None
        self._rounds = 0

    def start(self, title: str, rounds: int, first_round: int) -> None:
        """Print the title and show the bar."""
        self._traffic, self._rounds = _Traffic(), rounds
        self._console.print(Text(title, style="bold"), soft_wrap=True)
        self._show("round", max(0, first_round - 1))

    def message(self, text: str) -> None:
        """Print the line above the live block."""
        self._console.print(_plain(text), soft_wrap=True)

    def phase(self, text: str) -> None:
        """Show the phase in front of the bar."""
        self._progress.update(self._task, description=text)
        self._open().refresh()

    def round(self, record: Mapping[str, Any], eta_s: float | None) -> None:
        """Advance the bar and show the round's numbers, with a dash for what was not evaluated."""
        self._traffic.add(record)
        fields = list(_fields(record, self._traffic, eta_s))
        self._open().update(Group(self._progress, _packed(fields, self._console.width)))
        self._show(_label(record), record["round"])

    def finish(
        self,
        summary: Mapping[str, Any],
        run_dir: Path | str | None = None,
        tables: Sequence[Table] = (),
    ) -> None:
        """Close the live block, then print the tables and the run folder."""
        self.close()
        _print_summary(self._console, summary, run_dir, tables)

    def close(self) -> None:
        """Stop the live block and show the cursor again."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            atexit.unregister(self.close)

    def _show(self, description: str, completed: int) -> None:
        self._progress.update(
            self._task,
            description=description,
            completed=completed,
            total=self._rounds,
            count=f"{completed}/{self._rounds}",
        )
        self._open().refresh()

    def _open(self) -> Live:
        if self._live is None:
            self._live = Live(self._progress, console=self._console)
            self._live.start()
            # An uncaught error elsewhere must not leave the user's terminal without a cursor.
            atexit.register(self.close)
        return self._live


def _packed(fields: Sequence[tuple[str, str]], width: int) -> Text:
    """Lay out names and values in as many lines as they need, none broken inside a field."""
    numbers, used = Text(), 0
    for name, value in fields:
        # A live block is redrawn in place, so a line that the terminal wraps would leave remains.
        needed = len(name) + len(value) + 3
        if used and used + needed > width:
            numbers.append("\n")
            used = 0
        style = "bold red" if name == "rejected" else "bold"
        numbers.append(f"  {name} ", style="dim").append(value, style=style)
        used += needed
    return numbers


class LogDisplay(PlainDisplay):
    """Passes the lines of a plain display to a log, whose readers print the result themselves."""

    def __init__(self, write: Callable[[str], object]) -> None:
        super().__init__()
        self._write = write

    def finish(
        self,
        summary: Mapping[str, Any],
        run_dir: Path | str | None = None,
        tables: Sequence[Table] = (),
    ) -> None:
        """Write nothing: the operator's command shows the result of the run folder."""

    def _print(self, text: str) -> None:
        self._write(text)


class QuietDisplay:
    """Prints nothing until the run is complete, then its result."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)

    def start(self, title: str, rounds: int, first_round: int) -> None:
        """Print nothing."""

    def message(self, text: str) -> None:
        """Print nothing."""

    def phase(self, text: str) -> None:
        """Print nothing."""

    def round(self, record: Mapping[str, Any], eta_s: float | None) -> None:
        """Print nothing."""

    def finish(
        self,
        summary: Mapping[str, Any],
        run_dir: Path | str | None = None,
        tables: Sequence[Table] = (),
    ) -> None:
        """Print the summary table, the tables of protocols and the run folder."""
        _print_summary(self._console, summary, run_dir, tables)

    def close(self) -> None:
        """Do nothing, since this display does not change the terminal."""


def make_display(quiet: bool = False) -> Display:
    """Create the display that suits stdout.

    Args:
        quiet: Whether to print the result only.

    Returns:
        A live display for a terminal, plain lines for a file or pipe.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # An ASCII-only stdout must not end a run with an encoding error at the `±` of its summary.
        sys.stdout.reconfigure(errors="replace")
    if quiet:
        return QuietDisplay()
    console = Console(highlight=False)
    # isatty, not console.is_terminal: with FORCE_COLOR set, rich takes a pipe for a terminal.
    live = sys.stdout.isatty() and not console.is_dumb_terminal
    return RichDisplay(console) if live else PlainDisplay()
