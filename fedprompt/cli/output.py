"""Standard output and standard error that a long command can rely on.

A reader that goes away (`fedprompt run ... | head -2`), a full disk or a closed descriptor is no
reason to end a training of hours: the results are in the run folder. The output is then dropped,
one line on stderr says so, and the command goes on.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class LastingOutput(io.TextIOWrapper):
    """A text stream that goes on into nothing after its first failed write."""

    def write(self, text: str, /) -> int:
        """Write text; returns the number of characters, written or dropped."""
        try:
            return super().write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """Flush what was written."""
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        # What is still buffered, and all that follows, goes to the null device. Without this, the
        # interpreter would try to write it once more at its end and fail with status 120.
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self.fileno())
        os.close(nothing)
        if sys.stderr is not None and sys.stderr is not self:
            sys.stderr.write(
                f"fedprompt: cannot write the output ({error.strerror}); the command goes on "
                "without it\n"
            )


def use_lasting_output() -> None:
    """Replace the standard streams of this process, which must not have written anything yet."""
    _occupy_descriptors()
    # None where a descriptor was closed when Python started.
    sys.stdout = _lasting(sys.stdout)
    sys.stderr = _lasting(sys.stderr)


def _lasting(stream: Any) -> Any:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if type(stream) is not io.TextIOWrapper:
        return stream  # of a test, for example
    return LastingOutput(
        stream.detach(),
        encoding=stream.encoding,
        # Names of files need not be valid text, and an ASCII stream has no `±`.
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
    )


def _occupy_descriptors() -> None:
    """Open the null device in place of closed standard descriptors.

    Otherwise the next file that is opened gets such a number, and libraries that print to stdout
    or stderr would print into it.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
