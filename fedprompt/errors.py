"""The one error type that a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: one line that says what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2. Library callers may
    catch it. It is raised where config, data, messages and checkpoints come in, and nowhere else.
    Line breaks in the message (from a path or a library's text) become spaces.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def did_you_mean(name: str, known: list[str] | tuple[str, ...]) -> str:
    """`" Did you mean 'x'?"` when some known name is close, else the list of known names."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(sorted(known))}." if known else ""
