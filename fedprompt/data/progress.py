"""How long work on images reports its progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_S = 10.0
"""Seconds between two plain lines, at least. Work that is done sooner prints none."""
LINE_SHARE = 0.1
"""A plain line is due when this share of the work was done since the last one..."""
LONGEST_S = 60.0
"""... or when so many seconds have passed."""
log = logging.getLogger(__name__)


@contextmanager
def progress_bar(title: str, total: int, visible: bool) -> Iterator[Callable[[int], None]]:
    """Report progress on stderr if `visible`: a bar on a terminal, else a plain line now and then.

    Args:
        title: what is done, e.g. `checking flowers`.
        total: how many items there are.
        visible: False reports nothing.

    Yields:
        What advances the bar by a number of items.
    """
    if not visible:
        yield lambda count: None
        return
    if not sys.stderr.isatty():
        yield _Lines(title, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


class _Lines:
    """Prints `title: 2,000 of 20,000 (10 %), about 40 s left` from time to time.

    Args:
        title: what is done.
        total: how many items there are.
    """

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total = title, total
        self._done = self._told = 0
        self._start = self._last = time.monotonic()

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        waited = now - self._last
        due = waited >= LONGEST_S or self._done - self._told >= LINE_SHARE * self._total
        if not due or waited < LINE_S or self._done >= self._total:
            return
        left = (now - self._start) / self._done * (self._total - self._done)
        share = 100 * self._done / self._total
        print(
            f"{self._title}: {self._done:,} of {self._total:,} ({share:.0f} %), "
            f"about {left:,.0f} s left",
            file=sys.stderr,
            flush=True,
        )
        self._told, self._last = self._done, now


def announce(line: str, visible: bool) -> None:
    """Print a line to stderr if `visible` and no terminal shows a bar instead; else log it."""
    if visible and not sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)
    else:
        log.info(line)
