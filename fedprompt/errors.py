"""The error that a user is meant to read, and the exception that stops a run."""

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
        super().__init__(" ".join(message.split()))


class StopRun(Exception):
    """Raised by an `on_round` callback to stop a run after a round.

    The run folder stays as it is, so that the run can be resumed.
    """


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """`" Did you mean 'x'?"` when some known name is close, or else the list of known names."""
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(sorted(known))}." if known else ""
