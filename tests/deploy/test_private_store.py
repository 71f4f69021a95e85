"""A node's private tensors on disk: atomic, private to the user, and checked when they are read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fedprompt.deploy.private_store import FileStore
from fedprompt.errors import UserError
from fedprompt.files import write_bytes

AWKWARD = torch.tensor([[0.1, -0.0], [1e-45, 3.4e38]])
"""Values that a detour through text or float16 would change."""


def prompts(value: float) -> dict[str, Tensor]:
    return {"ctx": torch.full((2, 3), value)}


def bits(tensor: Tensor) -> list[int]:
    values: list[int] = tensor.contiguous().view(torch.int32).flatten().tolist()
    return values


def test_latest_returns_the_last_round_before_a_round(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "client-00000")
    assert store.latest(10) is None
    store.put(3, prompts(3.0))
    store.put(5, prompts(5.0))
    for before_round, expected in ((3, None), (4, 3.0), (5, 3.0), (6, 5.0), (99, 5.0)):
        stored = store.latest(before_round)
        if expected is None:
            assert stored is None
        else:
            assert stored is not None
            assert torch.equal(stored["ctx"], torch.full((2, 3), expected))


def test_a_repeated_round_starts_from_the_round_before_it(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    for server_round in (1, 2, 3):
        store.put(server_round, prompts(float(server_round)))
    store.put(3, prompts(33.0))
    before, after = store.latest(3), store.latest(4)
    assert before is not None
    assert after is not None
    assert before["ctx"][0, 0] == 2.0
    assert after["ctx"][0, 0] == 33.0


def test_two_rounds_are_kept(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    for server_round in (1, 2, 10, 9_999_999):
        store.put(server_round, prompts(1.0))
    names = ["round-000010.safetensors", "round-9999999.safetensors"]
    assert sorted(os.listdir(tmp_path)) == names


def test_later_rounds_are_removed_when_the_server_returns_to_a_checkpoint(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    for server_round in (9, 10):
        store.put(server_round, prompts(float(server_round)))
    store.put(6, prompts(6.0))
    stored = store.latest(7)
    assert stored is not None
    assert stored["ctx"][0, 0] == 6.0
    later = store.latest(99)
    assert later is not None
    assert later["ctx"][0, 0] == 6.0, "rounds 9 and 10 were before the server returned to round 6"


def test_files_have_mode_0600_and_the_same_bits(tmp_path: Path) -> None:
    folder = tmp_path / "node" / "client-00001"
    previous = os.umask(0o000)
    try:
        FileStore(folder).put(1, {"ctx": AWKWARD})
    finally:
        os.umask(previous)
    (path,) = folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    stored = FileStore(folder).latest(2)
    assert stored is not None
    assert bits(stored["ctx"]) == bits(AWKWARD)


def test_rows_of_one_tensor_can_be_stored(tmp_path: Path) -> None:
    block = torch.arange(12.0).view(2, 2, 3)
    FileStore(tmp_path).put(1, {"a": block[0], "b": block[1]})
    (path,) = tmp_path.iterdir()
    assert torch.equal(load_file(path)["b"], block[1])
    assert path.stat().st_size < 300, "only the row, not the whole tensor"


def test_no_tensors_write_no_file(tmp_path: Path) -> None:
    FileStore(tmp_path / "client").put(1, {})
    assert os.listdir(tmp_path) == []


def test_a_crash_while_writing_leaves_the_round_before_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tmp_path)
    store.put(1, prompts(1.0))

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            store.put(2, prompts(2.0))
    stored = store.latest(3)
    assert stored is not None
    assert stored["ctx"][0, 0] == 1.0
    assert os.listdir(tmp_path) == ["round-000001.safetensors"]


def test_other_files_in_the_folder_are_ignored(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put(1, prompts(1.0))
    for name in (".round-000002.safetensors.x7.tmp", "round-2.pt", "notes.txt"):
        (tmp_path / name).write_bytes(b"?")
    stored = store.latest(9)
    assert stored is not None
    assert stored["ctx"][0, 0] == 1.0


@pytest.mark.parametrize(
    "content", [b"", b"garbage", save(prompts(1.0))[:-4]], ids=["empty", "garbage", "short"]
)
def test_a_damaged_file_is_reported_in_one_line(tmp_path: Path, content: bytes) -> None:
    store = FileStore(tmp_path)
    store.put(1, prompts(1.0))
    write_bytes(tmp_path / "round-000002.safetensors", content)
    with pytest.raises(UserError, match=r"round-000002.safetensors cannot be read") as caught:
        store.latest(3)
    assert "\n" not in str(caught.value)
    assert "remove it" in str(caught.value)
    assert store.latest(2) is not None, "the round before is still there"


def test_a_folder_that_cannot_be_written_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = FileStore(tmp_path / "file" / "client-00000")
    assert store.latest(1) is None
    with pytest.raises(UserError, match="cannot write private state") as caught:
        store.put(1, prompts(1.0))
    assert "state-dir" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_changed_byte_is_reported(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put(1, prompts(1.0))
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    write_bytes(path, bytes(content))
    assert set(load_file(path)) == {"ctx"}, "safetensors itself does not notice"
    with pytest.raises(UserError, match="checksum does not match"):
        store.latest(2)
