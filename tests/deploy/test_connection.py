"""What a node's administrator reads while the server cannot be reached or rejects the node."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedprompt.deploy.connection import Connection, was_rejected

EXIT = """\x1b[91mERROR \x1b[0m:     Exit Code: 305
Failed to initialize the connection to the SuperLink.
{why}
The SuperNode could not establish a connection to the SuperLink.

For more information, visit: <https://flower.ai/305.html>
INFO:     Shutting down
WARNING :   Connection attempt failed, retrying in 0.25 seconds
"""
FAILED = "WARNING :   Connection attempt failed, retrying in 0.8 seconds\n"


class Log:
    """A SuperNode's log, and the lines that are reported about it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("INFO :      SuperNode ID: 77\n")  # written by an earlier start
        self.lines: list[str] = []
        self.server_answers = True
        self.fault: str | None = None
        self.connection = Connection(
            path, "fed:9092", self.lines.append, self.answers, lambda: self.fault
        )

    def answers(self) -> bool:
        return self.server_answers

    def add(self, text: str) -> None:
        with self.path.open("a") as stream:
            stream.write(text)
        self.connection.update()


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "supernode.log")


def test_every_change_is_one_line(log: Log) -> None:
    log.connection.update()
    assert log.lines == []
    log.add("INFO :      SuperNode ID: 77\n")
    log.server_answers = False
    for _ in range(3):
        log.add(FAILED)
    log.server_answers = True
    log.add("INFO :      Connection successful after 3.20 ")
    assert len(log.lines) == 2, "an incomplete line is not read yet"
    log.add("seconds and 4 tries.\n")
    states = ["connected to", "cannot be reached", "connected to"]
    assert len(log.lines) == len(states)
    assert all(state in line for state, line in zip(states, log.lines, strict=True))
    assert all("fed:9092" in line for line in log.lines)


def test_the_superexecs_connection_to_its_supernode_is_not_reported(log: Log) -> None:
    log.add(FAILED + "INFO :      Connection successful after 0.20 seconds and 2 tries.\n")
    assert log.lines == []


@pytest.mark.parametrize(
    "why",
    [
        "_ssl.c:989: The handshake operation timed out",
        "[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol (_ssl.c:1006)",
    ],
)
def test_a_handshake_that_fails_repeatedly_is_reported_once(log: Log, why: str) -> None:
    for _ in range(3):
        log.add(EXIT.format(why=why))
        log.connection.report_exit("supernode", 1)
    assert len(log.lines) == 1
    assert "fed:9092 cannot be reached" in log.lines[0]


@pytest.mark.parametrize(
    ("why", "words"),
    [
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed", "ca.crt"),
        ("[code: 2004] Failed to activate SuperNode.", "rejected this node"),
        ("something else", "exited with status 1: Failed to initialize the connection to the "
         "SuperLink. something else The SuperNode could not"),
    ],
)  # fmt: skip
def test_the_reason_of_an_exit_is_reported_once(log: Log, why: str, words: str) -> None:
    for _ in range(2):
        log.add(EXIT.format(why=why))
        waits = log.connection.report_exit("supernode", 1)
    assert waits is ("something" not in why)
    assert len(log.lines) == 1
    assert words in log.lines[0]
    assert "visit" not in log.lines[0]
    assert "Shutting down" not in log.lines[0]


def test_an_exit_without_a_reason_names_the_log(log: Log) -> None:
    log.add("INFO :      SuperNode ID: 77\n")
    log.connection.report_exit("supernode", -9)
    assert len(log.lines) == 2
    assert "status -9" in log.lines[1]
    assert str(log.path) in log.lines[1]
    log.server_answers = False
    log.connection.report_exit("supernode", 0)
    assert "cannot be reached" in log.lines[2]


def test_a_clock_or_a_certificate_is_not_called_out_of_reach(log: Log) -> None:
    log.fault = "the clock of this machine is 30 s ahead"
    for _ in range(3):
        log.add(FAILED)
    assert log.lines == ["the clock of this machine is 30 s ahead; retrying"]
    # Flower ends the SuperNode with status 0 and without a word.
    assert log.connection.report_exit("supernode", 0) is True
    log.add(EXIT.format(why="[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"))
    assert log.connection.report_exit("supernode", 1) is True
    assert len(log.lines) == 1
    log.fault = None
    log.add("INFO :      SuperNode ID: 77\n")
    assert "connected" in log.lines[1]


def test_a_rejected_node_is_started_again_as_often_as_needed(tmp_path: Path) -> None:
    log = tmp_path / "node.log"
    assert not was_rejected(log)
    log.write_text("Exit Code: 305\n[code: 2004] Failed to activate SuperNode.\n" + "end\n" * 8)
    assert was_rejected(log)
    log.write_text("Exit Code: 1\n" + "end\n" * 8)
    assert not was_rejected(log)
