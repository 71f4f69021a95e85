"""What the log of private tensors says about missing, damaged and foreign files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from fedprompt.errors import DamagedFile, UserError
from fedprompt.files import write_bytes
from fedprompt.files.rows import HEADER, RowWriter
from fedprompt.simulation.private_log import PrivateLog
from tests.support.private_states import contents, same, state


@pytest.fixture
def log(tmp_path: Path) -> PrivateLog:
    return PrivateLog(tmp_path / "private", 8)


@pytest.fixture
def sealed(log: PrivateLog) -> tuple[PrivateLog, str]:
    for server_round, clients in ((1, (1, 2, 3)), (2, (4, 5, 6))):
        for client in clients:
            log.put(client, state(client))
        digest = log.save(server_round)
    return PrivateLog(log.folder, 8), digest


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("missing", [1, 2])
def test_a_missing_file_is_one_line(sealed: tuple[PrivateLog, str], missing: int) -> None:
    log, digest = sealed
    log._path(missing).unlink()
    with pytest.raises(UserError, match="missing or were changed") as caught:
        log.restore(2, digest)
    assert "'fedprompt run " in one_line(caught)


def test_a_file_that_vanishes_during_the_run_is_one_line(sealed: tuple[PrivateLog, str]) -> None:
    log, digest = sealed
    log.restore(2, digest)
    log._path(1).unlink()
    assert same(log.get(4), state(4))
    with pytest.raises(UserError, match=r"round-000001\.safetensors are missing") as caught:
        log.get(1)
    one_line(caught)


def damaged() -> dict[str, bytes]:
    good = {"clients": torch.tensor([1, 2, 3]), "tensor/ctx": torch.zeros(3, 2)}
    return {
        "empty": b"",
        "garbage": b"no tensors at all",
        "short": save(good)[:-1],
        "no clients": save({"tensor/ctx": torch.zeros(3, 2)}),
        "float clients": save(good | {"clients": torch.zeros(3)}),
        "a client twice": save(good | {"clients": torch.tensor([1, 2, 2])}),
        "unknown client": save(good | {"clients": torch.tensor([1, 2, 8])}),
        "negative client": save(good | {"clients": torch.tensor([-1, 2, 3])}),
        "too few rows": save(good | {"tensor/ctx": torch.zeros(2, 2)}),
        "a scalar": save(good | {"tensor/ctx": torch.tensor(1.0)}),
    }


@pytest.mark.parametrize("kind", damaged())
def test_a_damaged_file_is_one_line(sealed: tuple[PrivateLog, str], kind: str) -> None:
    log, digest = sealed
    write_bytes(log._path(1), damaged()[kind])
    with pytest.raises(UserError, match=r"round-000001\.safetensors are damaged") as caught:
        log.restore(2, digest)
    one_line(caught)
    assert len(contents(log.folder)) == 2, "nothing is removed"


def test_another_files_rows_do_not_pass(sealed: tuple[PrivateLog, str]) -> None:
    log, digest = sealed
    write_bytes(log._path(1), log._path(2).read_bytes())
    with pytest.raises(UserError, match="missing or were changed"):
        log.restore(2, digest)


def test_a_flipped_bit_of_a_row_is_one_line(sealed: tuple[PrivateLog, str]) -> None:
    log, digest = sealed
    log.restore(2, digest)
    place = log._places.of("ctx", 2)
    whole = bytearray(log._path(1).read_bytes())
    whole[HEADER + place.offset + place.size - 1] ^= 1
    write_bytes(log._path(1), bytes(whole))
    with pytest.raises(DamagedFile, match=r"ctx.*client 2"):
        log.get(2)
    assert same(log.get(1), state(1))
    # A checkpoint that moves the row does not copy the damage.
    for client in (1, 3):
        log.put(client, state(10 + client))
    with pytest.raises(DamagedFile, match=r"round-000001\.safetensors"):
        log.save(3)


def test_a_full_disk_and_a_folder_that_cannot_be_made_are_one_line(
    log: PrivateLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    log.put(1, state(1))
    for name, act in (
        ("_write", lambda: log.put(2, state(2))),
        ("finish", lambda: log.save(1)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(RowWriter, name, full)
            with pytest.raises(UserError, match=r"No space left on device.*--resume") as caught:
                act()
        one_line(caught)
    digest = log.save(1)
    assert same(log.get(1), state(1)), "what could not be written is still there"
    again = PrivateLog(log.folder, 8)
    again.restore(1, digest)
    assert again.get(2) is None
    shutil.rmtree(log.folder)
    log.folder.write_bytes(b"")
    with pytest.raises(UserError, match="cannot write") as caught:
        log.put(3, state(3))
    one_line(caught)


def test_closing_removes_what_is_part_of_no_checkpoint(log: PrivateLog) -> None:
    log.put(1, state(1))
    log.close()
    assert list(contents(log.folder)) == []


def test_strangers_in_the_folder_are_left_alone(sealed: tuple[PrivateLog, str]) -> None:
    log, digest = sealed
    (log.folder / "notes.txt").write_bytes(b"mine")
    (log.folder / ".round-000003.safetensors.x.tmp").write_bytes(b"half")
    write_bytes(log._path(3), b"of a round after the checkpoint")
    log.restore(2, digest)
    names = ["notes.txt", "round-000001.safetensors", "round-000002.safetensors"]
    assert list(contents(log.folder)) == names
    log.clear()
    assert list(contents(log.folder)) == ["notes.txt"]
    assert log.get(1) is None
