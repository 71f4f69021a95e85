"""Text that comes from another machine, made safe for logs, terminals and files.

Whoever controls a node or the server can put any text into error messages and names: megabytes, or
control characters with which a terminal changes what it shows.
"""

from __future__ import annotations

import datetime
import json
import logging
import os

FORMAT = "FEDPROMPT_LOG_FORMAT"
"""Environment variable that makes logs on stderr, and the lines of `deploy server` and `deploy
node`, JSON objects if it is `json`."""
LONGEST_REASON = 500
"""Largest number of characters of a peer's text that are logged or stored."""


def sanitised(text: str, longest: int = LONGEST_REASON) -> str:
    """A peer's text as one line without control characters.

    Args:
        text: the text.
        longest: the largest number of characters of the result.
    """
    # Cut first, so that megabytes of text cost nothing; runs of white space only get shorter.
    line = " ".join(text[: 4 * longest].split())
    clean = "".join(c if c.isprintable() else "?" for c in line)
    whole = len(clean) <= longest and len(text) <= 4 * longest
    return clean if whole else clean[: longest - 3] + "..."


class SafeFormatter(logging.Formatter):
    """Formats log records so that no text of a peer can control a terminal or fill a disk.

    What we log of a peer is sanitised where it is logged. This is the second line of defence, for
    texts of libraries and for tracebacks, whose last line may quote a peer.
    """

    LONGEST_LINE, MOST_LINES = 2000, 200

    def format(self, record: logging.LogRecord) -> str:
        """The record, each line without control characters and cut, the last lines if too many."""
        lines = super().format(record).split("\n")
        if len(lines) > self.MOST_LINES:
            lines = [lines[0], "...", *lines[2 - self.MOST_LINES :]]
        # Tracebacks are indented, which `sanitised` would remove.
        indents = [len(line) - len(line.lstrip(" ")) for line in lines]
        return "\n".join(
            " " * min(indent, 80) + sanitised(line, self.LONGEST_LINE)
            for indent, line in zip(indents, lines, strict=True)
        )


class JsonLines(SafeFormatter):
    """Formats each log record as one JSON object, for programs that collect logs."""

    def format(self, record: logging.LogRecord) -> str:
        """The record with its time (UTC), level, logger and text, tracebacks included."""
        return json_line(super().format(record), record.levelname, record.name, record.created)


def json_line(text: str, level: str, source: str, seconds: float) -> str:
    """One event as a JSON object on one line.

    Args:
        text: what has happened.
        level: for example `INFO`.
        source: the logger or command that says so.
        seconds: when it happened, as `time.time()` tells it.
    """
    when = datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": when, "level": level, "source": source, "text": text})


def wants_json() -> bool:
    """Whether this process's logs are to be JSON lines."""
    return os.environ.get(FORMAT) == "json"


def stderr_formatter(style: str) -> logging.Formatter:
    """The formatter of a log on stderr: JSON lines if they are wanted, else text.

    Args:
        style: the text's format, for `logging.Formatter`.
    """
    return JsonLines() if wants_json() else SafeFormatter(style)
