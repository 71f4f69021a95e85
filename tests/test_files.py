"""Atomic replacement of files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fedprompt.files import replacing, write_bytes


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_content_and_mode(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    write_bytes(target, b"one")
    assert target.read_bytes() == b"one"
    assert mode_of(target) == 0o644
    write_bytes(target, b"two", mode=0o600)
    assert target.read_bytes() == b"two"
    assert mode_of(target) == 0o600
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("old", [b"old", None])
def test_a_crash_while_writing_leaves_what_was_there(tmp_path: Path, old: bytes | None) -> None:
    target = tmp_path / "a.bin"
    if old is not None:
        target.write_bytes(old)

    def crash_halfway() -> None:
        with replacing(target) as temporary:
            temporary.write_bytes(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crash_halfway()
    assert os.listdir(tmp_path) == ([] if old is None else ["a.bin"])
    if old is not None:
        assert target.read_bytes() == old


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with replacing(target) as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent == target.parent, "a rename across file systems is not atomic"
        assert temporary.name.startswith(".a.bin.")
        assert temporary.suffix == ".tmp"
        assert mode_of(temporary) == 0o600, "a private file is private from its first byte"
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"


def test_content_is_synced_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, order = tmp_path / "a.bin", []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(handle: int) -> None:
        order.append("sync folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "sync file")
        fsync(handle)

    def spy_replace(source: Path, place: Path) -> None:
        order.append("replace")
        replace(source, place)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    write_bytes(target, b"new")
    assert order == ["sync file", "replace", "sync folder"]


def test_a_failed_write_says_so_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(tmp_path / "a.bin", b"new")
    assert os.listdir(tmp_path) == []


def test_a_file_in_place_of_the_folder_is_an_oserror(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        write_bytes(tmp_path / "file" / "a.bin", b"new")
