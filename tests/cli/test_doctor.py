"""`fedprompt doctor` names each problem in one line and then exits with status 1."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from fedprompt.cli import doctor
from fedprompt.runtime.machine import Memory
from tests.cli.test_cli import fedprompt

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def _healthy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with nothing wrong, whatever this one is like."""
    monkeypatch.setenv("FEDPROMPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, 2**40))
    monkeypatch.setattr(doctor, "memory", lambda: Memory(2**36, 2**35))
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch>=2.0", "nothing; extra == 'dev'"])


def problems() -> list[str]:
    return [finding.problem for finding in doctor.examine() if finding.problem]


def test_a_healthy_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "features").write_bytes(bytes(3 * 2**20))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("https_proxy", "user:password@host")
    status, out, _ = fedprompt(monkeypatch, capsys, "doctor")
    assert status == 0
    for words in ("torch", "flwr", "ray", "CPU cores", "3.0 MiB in 1 files", "HF_HUB_OFFLINE"):
        assert words in out
    assert "32.0 GiB free" in out
    assert "no problem found" in out
    assert "password" not in out


def test_problems_are_a_line_each_and_the_exit_status_is_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, 2**29))
    monkeypatch.setattr(doctor, "memory", lambda: Memory(2**36, 2**20))
    status, out, _ = fedprompt(monkeypatch, capsys, "doctor")
    assert status == 1
    told = [line for line in out.splitlines() if line.startswith("PROBLEM ")]
    assert len(told) == 3  # the cache's disk, this folder's, memory
    assert "only 512.0 MiB of disk are free" in out
    assert "only 1.0 MiB of memory are free" in out
    assert "no problem" not in out


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDPROMPT_CACHE", str(tmp_path / "file" / "cache"))
    (told,) = problems()
    assert "FEDPROMPT_CACHE" in told


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("torch>=99", "does not fit >=99: pip install 'torch>=99'"),
        ("no-such-package>=1", "no-such-package is missing: pip install 'no-such-package>=1'"),
    ],
)
def test_packages_that_do_not_fit(line: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requires", lambda name: [line])
    (told,) = problems()
    assert words in told


def test_a_missing_flower_program(monkeypatch: pytest.MonkeyPatch) -> None:
    found = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name, **more: None if name == "flwr" else found(name, **more)
    )
    (told,) = problems()
    assert told.startswith("flwr ")
    assert "pip install flwr" in told
