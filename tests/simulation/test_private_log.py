"""Private tensors on disk: what was put comes back bit for bit, whatever happens in between."""

from __future__ import annotations

import os
import stat
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedprompt.files.places import PENDING, Place
from fedprompt.rng import generator
from fedprompt.simulation.private_log import PrivateLog
from tests.support.private_states import contents, same, state

AWKWARD = torch.tensor([[0.1, -0.0], [1e-45, 3.4e38]])


@pytest.fixture
def log(tmp_path: Path) -> PrivateLog:
    return PrivateLog(tmp_path / "private", 8)


def test_states_come_back_bit_for_bit(log: PrivateLog) -> None:
    assert log.get(3) is None
    log.put(3, {"ctx": AWKWARD, "theta": torch.tensor(0.3)})
    log.put(0, {"ctx": -AWKWARD, "theta": torch.tensor(-0.3)})
    before = {c: log.get(c) for c in range(8)}
    digest = log.save(4)
    again = PrivateLog(log.folder, 8)
    again.restore(4, digest)
    for client in range(8):
        assert same(log.get(client), before[client])
        assert same(again.get(client), before[client])
    assert [c for c in range(8) if again.get(c) is not None] == [0, 3]


def test_nothing_private_leaves_no_folder(log: PrivateLog) -> None:
    log.put(1, {})
    log.clear()
    digest = log.save(1)
    log.remove_stale()
    assert not log.folder.exists()
    log.restore(1, digest)
    assert log.get(1) is None


def test_files_are_private_and_hold_only_what_is_new(log: PrivateLog) -> None:
    previous = os.umask(0o000)
    try:
        for server_round, clients in ((1, (5, 2)), (2, (7, 3)), (3, ())):
            for client in clients:
                log.put(client, state(client))
            log.save(server_round)
            log.remove_stale()
    finally:
        os.umask(previous)
    assert stat.S_IMODE(log.folder.stat().st_mode) == 0o700
    assert sorted(os.listdir(log.folder)) == [
        "round-000001.safetensors",
        "round-000002.safetensors",
    ]
    for path, clients in zip(sorted(log.folder.iterdir()), ([2, 5], [3, 7]), strict=True):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert load_file(path)["client"].tolist() == clients * 2, "for each of two names"


def test_a_file_goes_when_its_last_row_is_dead_and_not_before_the_checkpoint(
    log: PrivateLog,
) -> None:
    log.put(1, state(1))
    old = log.save(1)
    log.put(1, state(2))
    log.save(2)
    assert len(contents(log.folder)) == 2, "the checkpoint of round 1 may still be the last one"
    back = PrivateLog(log.folder, 8)
    back.read(1, old)
    assert same(back.get(1), state(1))
    log.remove_stale()
    assert list(contents(log.folder)) == ["round-000002.safetensors"]


def test_live_rows_of_a_half_dead_file_move(log: PrivateLog) -> None:
    for client in range(4):
        log.put(client, state(client))
    log.save(1)
    for client in (0, 1):
        log.put(client, state(10 + client))
    digest = log.save(2)
    log.remove_stale()
    (path,) = log.folder.iterdir()
    assert path.name == "round-000002.safetensors"
    assert load_file(path)["client"].tolist() == [0, 1, 2, 3] * 2
    again = PrivateLog(log.folder, 8)
    again.restore(2, digest)
    for client, value in enumerate((10, 11, 2, 3)):
        assert same(again.get(client), state(value))


def test_no_more_rows_move_than_were_put(log: PrivateLog) -> None:
    for client in range(8):
        log.put(client, state(client))
    log.save(1)
    for server_round, client in enumerate(range(7), start=2):
        log.put(client, state(100 + client))
        log.save(server_round)
        log.remove_stale()
        assert len(load_file(log._path(server_round))["client"]) <= 2 * 2, "at most one moved"
    assert not log._path(1).exists(), "its last row has moved"


@pytest.mark.parametrize(("clients", "taking_part"), [(300, 30), (40, 3), (50, 50)])
def test_disk_and_writing_stay_within_a_factor(
    tmp_path: Path, clients: int, taking_part: int
) -> None:
    log, draw = PrivateLog(tmp_path / "private", clients), generator(1, "puts")
    for server_round in range(1, 61):
        for client in draw.choice(clients, taking_part, replace=False):
            log.put(int(client), state(server_round))
        put = log._places.total[PENDING]
        log.save(server_round)
        log.remove_stale()
        assert log._places.total[server_round] <= 2 * put
        assert sum(log._places.total.values()) <= 2 * sum(log._places.live.values())


class Frozen:
    """States with a large tensor that stays and a small one that is trained."""

    def __init__(self) -> None:
        self.keys = {c: torch.full((100, 50), float(c)) for c in range(8)}

    def after(self, client: int, server_round: int) -> dict[str, torch.Tensor]:
        return {"keys": self.keys[client].clone(), "ctx": torch.full((3,), float(server_round))}


def test_what_does_not_change_is_written_once_per_client(log: PrivateLog) -> None:
    frozen, sizes = Frozen(), []
    for server_round in range(1, 9):
        for client in (server_round % 4, 4 + server_round % 4):
            log.put(client, frozen.after(client, server_round))
        digest = log.save(server_round)
        log.remove_stale()
        path = log._path(server_round)
        sizes.append(path.stat().st_size)
    assert min(sizes[:4]) > 2 * 100 * 50 * 4, "each client's first round has both tensors"
    assert max(sizes[4:]) < 3000, "its second round has the trained one alone"
    again = PrivateLog(log.folder, 8)
    again.restore(8, digest)
    for client in range(8):
        newest = max(r for r in range(1, 9) if r % 4 == client % 4)
        assert same(again.get(client), frozen.after(client, newest))


def test_an_unchanged_state_writes_nothing(log: PrivateLog) -> None:
    log.put(3, state(1))
    digest = log.save(1)
    again = PrivateLog(log.folder, 8)
    again.restore(1, digest)
    again.put(3, state(1))
    assert again.save(2) == digest
    assert [path.name for path in log.folder.iterdir()] == ["round-000001.safetensors"]


def test_the_digest_tells_every_bit_and_no_order(tmp_path: Path) -> None:
    digests = []
    for number, clients in enumerate(([1, 2], [2, 1], [1, 2, 3])):
        log = PrivateLog(tmp_path / str(number), 8)
        for client in clients:
            log.put(client, state(client))
        digests.append(log.save(1))
    log.put(2, {"ctx": -state(2)["ctx"], "theta": state(2)["theta"]})
    digests.append(log.digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_other_names_than_before_are_refused(log: PrivateLog) -> None:
    log.put(3, state(1))
    with pytest.raises(ValueError, match="client 3"):
        log.put(3, {"ctx": torch.zeros(2, 3)})


def test_memory_holds_no_row_that_was_put(log: PrivateLog) -> None:
    tracemalloc.start()
    try:
        for client in range(8):
            log.put(client, {"keys": torch.full((1000, 256), float(client))})
        log.save(1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 1000 * 256 * 4, "a few copies of one of eight rows"


def test_memory_is_56_bytes_a_client_and_tensor() -> None:
    log = PrivateLog(Path("nowhere"), 10_000)
    assert log._places.empty, "and nothing before the first put"
    log._places.put("ctx", 7, Place(PENDING, 0, 1, bytes(32)))
    column = log._places._columns["ctx"]
    arrays = (column.file_K, column.offset_K, column.size_K, column.sums_K)
    assert sum(array.nbytes for array in arrays) == 56 * 10_000
