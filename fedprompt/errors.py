"""The error that is written for the user to read, and the exception that stops a run.

`UserError` is used on all sides: command line, server, clients and nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


class UserError(Exception):
    """A mistake that the user can correct: one line that says what is wrong and what to do.

    The command line prints the line without a traceback and exits with status 2; a library caller
    may catch the exception. It is raised where configs, data, messages and checkpoints are read,
    and nowhere else. Line breaks in the message, which paths and texts of other libraries may
    contain, become spaces.
    """

    def __init__(self, message: str) -> None:
        # One line, because logs, rejection reasons and the terminal show one line per error.
        super().__init__(" ".join(message.split()))


class RunFailed(UserError):
    """A run that ended without a result; the command's exit status is 1 and not 2."""


class DamagedFile(UserError):
    """A file that is not what was written: cut off, or with a changed byte.

    A simulation ends with it even where other errors only exclude one client from a round, because
    the results would otherwise depend on the damage.
    """


class DeviceFault(RunFailed):
    """A GPU has failed such that this process cannot use it any more.

    It says nothing about the client that was training: a worker that meets it is replaced, and its
    clients are asked again. Without another process, the run ends.
    """


class StopRun(Exception):
    """Raised by an `on_round` callback to stop a run after a round.

    The run folder stays as it is, so that the run can be resumed.
    """


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return a hint to append to an error message about an unknown name.

    Args:
        name: the unknown name.
        known: the names that would have been valid.

    Returns:
        `" Did you mean 'x'?"` if a known name is similar, otherwise the list of known names. It
        begins with a space, and is empty if no names are known.
    """
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(sorted(known))}." if known else ""


def any_of(names: Sequence[str]) -> str:
    """The names that would do, for an error message: `a`, `a or b`, `a, b or c`.

    Args:
        names: at least one name.
    """
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
