"""A journal keeps every entry through kills, and a change of any byte of it is found."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fedprompt.deploy.governance import journal
from fedprompt.deploy.governance.journal import TORN, Journal, verify
from fedprompt.errors import UserError


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "records" / "audit.jsonl"
    log = Journal(path, "audit log")
    for k in range(4):
        log.append("asked", number=k, text="ü\n")
    return path


def test_entries_are_chained_and_on_disk(written: Path) -> None:
    entries = verify(written, "audit log")
    assert [e["number"] for e in entries] == [0, 1, 2, 3]
    assert [e["previous"] for e in entries[1:]] == [e["hash"] for e in entries[:-1]]
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert verify(written, "audit log", entries[2]["hash"]) == entries
    with pytest.raises(UserError, match="no entry with the hash"):
        verify(written, "audit log", "f" * 64)


def test_any_change_is_found(written: Path) -> None:
    content = written.read_bytes()
    lines = content.splitlines(keepends=True)
    forged = json.loads(lines[3]) | {"number": 9}
    forgeries = [
        content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in range(0, len(content), 7)
    ]
    forgeries += [
        b"".join(lines[:3]),  # the last entry removed
        b"",
        b"".join(lines[1:]),
        b"".join([lines[0], lines[2], lines[1], lines[3]]),
        b"".join([*lines, lines[3]]),
        b"".join([*lines[:3], journal._canonical(forged), b"\n"]),
        # A forger who computes the hash again is found by the head.
        b"".join([*lines[:3], journal._canonical(forged | {"hash": journal._hash(forged)}), b"\n"]),
    ]
    for forgery in forgeries:
        written.write_bytes(forgery)
        with pytest.raises(UserError, match="has been changed"):
            verify(written, "audit log")
        with pytest.raises(UserError, match="has been changed"):
            Journal(written, "audit log").append("asked")
        assert written.read_bytes() == forgery, "a changed file must be kept as evidence"
    written.unlink()
    with pytest.raises(UserError, match="has been changed"):
        verify(written, "audit log")
    written.write_bytes(content)
    written.with_name("audit.jsonl.head").unlink()
    with pytest.raises(UserError, match="has been removed"):
        verify(written, "audit log")


def test_an_incomplete_line_is_cut_off_and_mentioned(written: Path) -> None:
    with written.open("ab") as stream:
        stream.write(b'{"event":"as')
    assert len(verify(written, "audit log")) == 4
    Journal(written, "audit log").append("asked", number=4)
    entries = verify(written, "audit log")
    assert [e["event"] for e in entries] == ["asked"] * 4 + [TORN, "asked"]
    assert entries[4]["bytes"] == 12


def test_two_writers_share_a_chain(written: Path) -> None:
    first, second = Journal(written, "audit log"), Journal(written, "audit log")
    for k in range(3):
        first.append("asked", by=1, number=k)
        second.append("asked", by=2, number=k)
    assert len(verify(written, "audit log")) == 10


def test_a_full_disk_is_one_line(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    log = Journal(written, "audit log")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"audit\.jsonl.*No space left"):
        log.append("asked")


KILLED = """
import os, signal, sys
from pathlib import Path
from fedprompt.deploy.governance import journal
path, calls = Path(sys.argv[1]), int(sys.argv[2])
real = {}
def dying(name):
    def call(*args, **kwargs):
        global calls
        calls -= 1
        if calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real[name](*args, **kwargs)
    return call
for name in ("fsync", "replace", "open"):
    real[name] = getattr(os, name)
    setattr(os, name, dying(name))
log = journal.Journal(path, "audit log")
for k in range(3):
    log.append("asked", number=k)
    print(k, flush=True)
"""


@pytest.mark.slow
def test_no_kill_loses_an_entry_or_the_chain(tmp_path: Path) -> None:
    for calls in range(1, 40):
        path = tmp_path / str(calls) / "audit.jsonl"
        command = [sys.executable, "-c", KILLED, str(path), str(calls)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        acknowledged = len(done.stdout.split())
        numbers = [e["number"] for e in verify(path, "audit log") if "number" in e]
        assert numbers == list(range(len(numbers)))
        assert acknowledged <= len(numbers) <= acknowledged + 1
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
    else:
        pytest.fail("the script was killed every time")
