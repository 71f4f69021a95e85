"""The scan of a folder: what is read, decoded and remembered, also when it is interrupted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedprompt.data.sources.parts import integrity
from fedprompt.data.sources.parts.integrity import Scan, journal_path
from fedprompt.data.sources.parts.verdicts import Journal, Verdict, settled, stamp_of
from tests.support.fake_data import encoded

LONG_AGO = 1_500_000_000


class Killed(BaseException):
    """Stands for a kill: nothing in the program catches it."""


class Folder:
    """A flat folder of images, and counts of what a scan does with them."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.cache = root / "images", root / "cache"
        self.root.mkdir()
        self.read: list[str] = []
        self.decoded = 0
        self.dies_at = ""
        decode = integrity.decode

        def counted(data: bytes, pixels: object) -> object:
            self.decoded += 1
            return decode(data, pixels)

        monkeypatch.setattr(integrity, "decode", counted)

    @property
    def journal(self) -> Path:
        return journal_path(self.cache, "here")

    def write(self, name: str, colour: int, seconds: float = LONG_AGO) -> None:
        """Write an image whose times say that it was written long ago, unless told otherwise."""
        path = self.root / name
        path.write_bytes(encoded((colour, 0, 0)))
        os.utime(path, (seconds, seconds))

    def names(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir())

    def scan(self, names: Sequence[str] | None = None) -> Scan:
        asked = self.names() if names is None else list(names)
        self.read, self.decoded = [], 0

        def read(index: int) -> bytes:
            if asked[index] == self.dies_at:
                raise Killed
            self.read.append(asked[index])
            return (self.root / asked[index]).read_bytes()

        def stamp(name: str) -> tuple[int, ...] | None:
            # Files of a test are young, and their times of status change cannot be set back.
            found = stamp_of(self.root / name)
            return None if found is None else (*found[:2], found[1], found[3])

        return integrity.scan(asked, stamp, read, self.journal, "flat")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    return Folder(tmp_path, monkeypatch)


def test_an_unchanged_file_is_not_read_and_known_content_is_not_decoded(folder: Folder) -> None:
    for i in range(8):
        folder.write(f"{i}.png", i)
    first = folder.scan()
    assert len(set(first.verdicts)) == folder.decoded == 8
    assert folder.scan() == first
    assert folder.read == []
    folder.write("1.png", 1, LONG_AGO + 1)  # written again
    (folder.root / "2.png").rename(folder.root / "9.png")
    folder.write("3.png", 103)  # same size and time, but not the same inode
    assert (folder.root / "3.png").replace(folder.root / "3.old")
    folder.write("3.png", 103)
    (folder.root / "3.old").unlink()
    again = folder.scan()
    assert sorted(folder.read) == ["1.png", "3.png", "9.png"]
    assert folder.decoded == 1
    assert {v.hash for v in again.verdicts} ^ {v.hash for v in first.verdicts} == {
        again.verdicts[2].hash,
        first.verdicts[3].hash,
    }


@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_scan_goes_on_where_it_was(folder: Folder, torn: bool) -> None:
    for i in range(100):
        folder.write(f"{i:03d}.png", i)
    for i in (4, 14):
        (folder.root / f"{i:03d}.png").write_bytes(b"no image")
        os.utime(folder.root / f"{i:03d}.png", (LONG_AGO, LONG_AGO))
    folder.dies_at = "090.png"
    with pytest.raises(Killed):
        folder.scan()
    if torn:
        with folder.journal.open("ab") as file:
            file.write(b'0badc0de {"images": {"09')
    folder.dies_at = ""
    found = folder.scan()
    assert set(folder.read) >= set(folder.names()[90:])
    assert len(folder.read) <= 15
    assert [i for i, v in enumerate(found.verdicts) if v.reason] == [4, 14]
    # Once a scan is complete, unreadable images get another chance: they are few, and it may have
    # been a matter of permissions or of a package that was missing.
    assert folder.scan() == found
    assert folder.read == ["004.png", "014.png"]


def test_a_damaged_journal_costs_the_damaged_lines(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(100):
        folder.write(f"{i:03d}.png", i)
    first = folder.scan()
    content = folder.journal.read_bytes()
    folder.journal.write_bytes(content[:100] + b"#" + content[101:])
    assert folder.scan() == first
    assert 1 <= len(folder.read) <= 2
    assert "is damaged" in caplog.text
    caplog.clear()
    assert folder.scan() == first
    assert folder.read == []
    assert "damaged" not in caplog.text, "it was written anew"


def test_images_that_are_not_asked_for_are_remembered_while_they_exist(folder: Folder) -> None:
    for i in range(4):
        folder.write(f"{i}.png", i)
    first = folder.scan()
    some = folder.scan(["0.png", "2.png"])
    assert some.others == (first.verdicts[1].hash, first.verdicts[3].hash)
    (folder.root / "3.png").unlink()
    assert folder.scan(["0.png", "2.png"]).others == (first.verdicts[1].hash,)
    assert folder.scan().verdicts == first.verdicts[:3]
    assert folder.read == []


def test_a_young_file_is_read_again_until_its_times_tell_of_changes(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = LONG_AGO
    monkeypatch.setattr(integrity.time, "time_ns", lambda: int(now * 1e9))
    folder.write("old.png", 1, LONG_AGO - 3)
    folder.write("young.png", 2, LONG_AGO - 0.05)
    first = folder.scan()
    path = folder.root / "young.png"
    path.write_bytes(encoded((3, 0, 0)))  # the same inode, and perhaps the same tick of the clock
    os.utime(path, (LONG_AGO - 0.05, LONG_AGO - 0.05))
    now += 10
    second = folder.scan()
    assert folder.read == ["young.png"]
    assert second.verdicts[1] != first.verdicts[1]
    assert folder.scan() == second
    assert folder.read == []


@pytest.mark.parametrize(
    ("modified_ns", "is_settled"),
    [
        (10_000_000_000, False),
        (9_850_000_000, True),
        (9_950_000_000, False),
        (9_000_000_000, False),  # whole seconds, perhaps because the file system has no others
        (7_000_000_000, True),
        (11_500_000_000, False),  # in the future
    ],
)
def test_which_times_are_trusted(modified_ns: int, is_settled: bool) -> None:
    assert settled((3, modified_ns, modified_ns, 1), now_ns=10_000_000_000) is is_settled


def test_a_journal_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedprompt.data.sources.parts.verdicts.LINE_IMAGES", 4)
    path, sizes = tmp_path / "x.journal", []
    for turn in range(40):
        journal = Journal(path)
        journal.add({f"{i}": ((100 + turn,), Verdict(f"hash {100 + turn}")) for i in range(10)})
        journal.complete([])
        sizes.append(path.stat().st_size)
    assert max(sizes[10:]) == max(sizes[:10])
    assert Journal(path).verdict("9", (139,)) == Verdict("hash 139")


def test_a_scan_of_an_earlier_version_is_named_once(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    folder.journal.parent.mkdir(parents=True)
    folder.journal.with_suffix(".json").write_text("{}")
    folder.write("0.png", 0)
    folder.scan()
    folder.scan()
    assert caplog.text.count("earlier version") == 1
