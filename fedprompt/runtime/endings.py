"""How a command ends when it is asked to: by Ctrl-C, by SIGTERM or by SIGHUP.

Service managers, schedulers and `timeout` send SIGTERM, and a terminal that is closed sends SIGHUP.
All three raise a KeyboardInterrupt in the main thread, so that every `finally` and `with` block on
the way out runs and child processes are ended. The command then prints one line that says how to
go on.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)  # SIGHUP does not exist on every system

IMPATIENCE_S = 1.0
"""Seconds after which a second Ctrl-C counts. `timeout` signals a process and then its group, so
the process receives every signal twice."""

Advice = Callable[[], str]


class _State:
    """What this process has been asked, and what it will say when it ends."""

    handled: tuple[signal.Signals, ...] = ()
    received: signal.Signals | None = None
    received_at: float = 0.0
    advice: Advice | None = None
    name: str = "fedprompt"


def run_command(command: Callable[[], None], name: str = "fedprompt") -> None:
    """Run a command line, and end with one line and an exit status if a signal asks for it.

    Args:
        command: the command. Whatever it raises while it ends after a signal is not shown.
        name: the name at the start of the line.

    Raises:
        SystemExit: a signal has ended the command; the status is 128 plus the signal's number, as
            in shells.
    """
    handle_signals()
    _State.name = name
    try:
        command()
    except BaseException as error:
        number = _State.received
        finished = isinstance(error, SystemExit) and not error.code
        if number is None or finished:
            raise
        # The terminal may be gone.
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(last_line())
            sys.stderr.flush()
        sys.exit(128 + number)


def handle_signals() -> None:
    """Let every signal in `SIGNALS` raise a KeyboardInterrupt in the main thread.

    A signal that is ignored stays ignored, because `nohup` and the shell's `&` rely on that.
    """
    _State.handled = tuple(s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN)
    _State.received = None
    restore_handlers()


def restore_handlers() -> None:
    """Install the handlers again after a library has replaced them, as Ray does when it starts.

    It does nothing in a process that has not called `handle_signals`, for example in a notebook.
    """
    for number in _State.handled:
        signal.signal(number, _on_signal)


def check_signals() -> None:
    """Raise the KeyboardInterrupt of an earlier signal, if it was lost.

    Python prints and drops an exception that is raised in a destructor or in a callback from C.
    Loops that may run for a long time therefore call this function.

    Raises:
        KeyboardInterrupt: a signal has asked this process to end.
    """
    if _State.received is not None:
        raise KeyboardInterrupt


@contextlib.contextmanager
def advice(text: Advice) -> Iterator[None]:
    """Set what the command says about going on, if it is asked to end inside this block.

    Of nested blocks, the outermost one counts: a run of a sweep is continued by the sweep's
    command.

    Args:
        text: returns the words after "interrupted; ". It is called at the end, and can therefore
            look at what exists by then.
    """
    if _State.advice is not None:
        yield
        return
    _State.advice = text
    try:
        yield
    finally:
        # `last_line` needs it after the block has been left.
        if _State.received is None:
            _State.advice = None


def command_line(*arguments: str) -> str:
    """A command of ours as it is typed in a shell; without arguments, the one that runs now."""
    return shlex.join(["fedprompt", *(arguments or sys.argv[1:])])


def last_line() -> str:
    """What the command prints when a signal has ended it."""
    number = _State.received
    by = f" by {number.name}" if number not in (None, signal.SIGINT) else ""
    text = f"; {_State.advice()}" if _State.advice else ""
    return f"{_State.name}: interrupted{by}{text}\n"


def _on_signal(number: int, frame: FrameType | None) -> None:
    del frame
    if _State.received is None:
        _State.received, _State.received_at = signal.Signals(number), time.monotonic()
        raise KeyboardInterrupt
    # The process is ending. A terminal that is closed sends SIGHUP twice, and a service manager may
    # send SIGTERM and SIGHUP: none of them may cut the ending short. A user who presses Ctrl-C
    # again does not want to wait; the children are then ended by those who watch this process.
    if number == signal.SIGINT and time.monotonic() - _State.received_at > IMPATIENCE_S:
        # `os.write`, because the signal may have interrupted a write to the same stream.
        with contextlib.suppress(OSError):
            os.write(2, last_line().encode(errors="replace"))
        os._exit(128 + number)
