"""How long work on images reports its progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)


@contextmanager
def progress_bar(title: str, total: int, visible: bool) -> Iterator[Callable[[int], None]]:
    """Draw a bar on stderr if `visible` and stderr is a terminal; yields what advances it."""
    if not (visible and sys.stderr.isatty()):
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


def announce(line: str, visible: bool) -> None:
    """Print a line to stderr if `visible` and no terminal shows a bar instead; else log it."""
    if visible and not sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)
    else:
        log.info(line)
