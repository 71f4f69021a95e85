"""What a node's operator reads while the server is out of reach, or does not let the node in."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedprompt.deploy.connection import Connection

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
    """A SuperNode's log, and what is said of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("INFO :      SuperNode ID: 77\n")  # of an earlier start
        self.lines: list[str] = []
        self.server_answers = True
        self.connection = Connection(path, "fed:9092", self.lines.append, self.answers)

    def answers(self) -> bool:
        return self.server_answers

    def add(self, text: str) -> None:
        with self.path.open("a") as stream:
            stream.write(text)
        self.connection.look()


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "supernode.log")


def test_every_change_is_one_line(log: Log) -> None:
    log.connection.look()
    assert log.lines == []
    log.add("INFO :      SuperNode ID: 77\n")
    log.server_answers = False
    for _ in range(3):
        log.add(FAILED)
    log.server_answers = True
    log.add("INFO :      Connection successful after 3.20 ")
    assert len(log.lines) == 2, "half a line is no line yet"
    log.add("seconds and 4 tries.\n")
    assert log.lines == [
        "connected to the server fed:9092",
        "the server fed:9092 is out of reach; trying until it answers",
        "connected to the server fed:9092",
    ]


def test_what_the_superexec_says_of_its_supernode_is_not_of_the_server(log: Log) -> None:
    log.add(FAILED + "INFO :      Connection successful after 0.20 seconds and 2 tries.\n")
    assert log.lines == []


@pytest.mark.parametrize(
    "why",
    [
        "_ssl.c:989: The handshake operation timed out",
        "[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol (_ssl.c:1006)",
    ],
)
def test_a_handshake_that_breaks_off_again_and_again_is_one_line(log: Log, why: str) -> None:
    for _ in range(3):
        log.add(EXIT.format(why=why))
        log.connection.ended("supernode", 1)
    assert log.lines == ["the server fed:9092 is out of reach; trying until it answers"]


@pytest.mark.parametrize(
    ("why", "said"),
    [
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed", "is not this federation's"),
        ("[code: 2004] Failed to activate SuperNode.", "does not let this node in"),
        ("something else", "supernode has ended with status 1: Failed to initialize the connection "
         "to the SuperLink. something else The SuperNode could not"),
    ],
)  # fmt: skip
def test_why_a_supernode_ends(log: Log, why: str, said: str) -> None:
    for _ in range(2):
        log.add(EXIT.format(why=why))
        log.connection.ended("supernode", 1)
    assert len(log.lines) == 1
    assert said in log.lines[0]
    assert "visit" not in log.lines[0]
    assert "Shutting down" not in log.lines[0]


def test_a_supernode_that_ends_without_a_word(log: Log) -> None:
    log.add("INFO :      SuperNode ID: 77\n")
    log.connection.ended("supernode", -9)
    assert log.lines[1:] == [f"supernode has ended with status -9: see {log.path}"]
    log.server_answers = False
    log.connection.ended("supernode", 0)
    assert "is out of reach" in log.lines[2]
