"""Text of peers cannot control a terminal, forge a line of a log, or fill a disk."""

from __future__ import annotations

import datetime
import io
import json
import logging

import pytest

from fedprompt.runtime.peer_text import (
    FORMAT,
    LONGEST_REASON,
    SafeFormatter,
    sanitised,
    stderr_formatter,
)

EVIL = "\x1b[2J\x1b]0;owned\x07\u202e\u2028\ud800\x00\x9b31m"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("plain, ünïcödé 川", "plain, ünïcödé 川"),
        ("two\r\nlines\tand  spaces", "two lines and spaces"),
        ("\x1b[31mred", "?[31mred"),
        ("x" * LONGEST_REASON, "x" * LONGEST_REASON),
        ("x" * 10**7, "x" * (LONGEST_REASON - 3) + "..."),
        (" " * 10**6 + "x", "..."),
    ],
    ids=range(7),
)
def test_a_peers_text_is_one_short_printable_line(text: str, expected: str) -> None:
    assert sanitised(text) == expected


def test_control_characters_do_not_pass() -> None:
    assert sanitised(EVIL).isprintable()
    sanitised(EVIL).encode("utf-8")


def formatted(message: str, error: Exception | None = None) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(SafeFormatter("%(levelname)s %(message)s"))
    record = logging.LogRecord("x", logging.ERROR, "", 0, message, None, None)
    if error is not None:
        try:
            raise error
        except Exception as raised:
            record.exc_info = (type(raised), raised, raised.__traceback__)
    handler.emit(record)
    return stream.getvalue()


def test_every_line_of_a_log_is_safe() -> None:
    assert formatted("round 3: client 1 has joined") == "ERROR round 3: client 1 has joined\n"
    text = formatted(EVIL + "x" * 10**6, ValueError(f"first\n    second {EVIL}" + "y" * 10**6))
    assert all(line.isprintable() for line in text.split("\n"))
    assert len(text) < 10_000
    assert "\nTraceback" in text
    assert '\n  File "' in text, "tracebacks keep their indents"
    assert "\n    second ?[2J" in text
    assert len(formatted("", ValueError("\n" * 10**6)).split("\n")) < 250


def test_logs_are_json_lines_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    record = logging.LogRecord(
        "fedprompt.node", logging.WARNING, "f.py", 1, "a\x1b\n%s", ("b",), None
    )
    assert not json_or_none(stderr_formatter("%(message)s").format(record))
    monkeypatch.setenv(FORMAT, "json")
    line = stderr_formatter("%(message)s").format(record)
    assert "\n" not in line
    event = json.loads(line)
    assert (event["level"], event["source"]) == ("WARNING", "fedprompt.node")
    assert event["text"] == "a?\nb"
    assert datetime.datetime.fromisoformat(event["time"]).timestamp() == pytest.approx(
        record.created, abs=1e-3
    )


def json_or_none(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None
