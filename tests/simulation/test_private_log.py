"""Private tensors on disk: what was put comes back bit for bit, whatever happens in between."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

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
        tensors = load_file(path)
        assert tensors["clients"].tolist() == clients
        assert tensors["tensor/ctx"].shape == (2, 2, 3)


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
    assert load_file(path)["clients"].tolist() == [0, 1, 2, 3]
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
        rows = len(load_file(log._path(server_round))["clients"])
        assert rows <= 2, "one put, so at most one moved"
    assert not log._path(1).exists(), "its last row has moved"


@pytest.mark.parametrize(("clients", "taking_part"), [(300, 30), (40, 3), (50, 50)])
def test_disk_and_writing_stay_within_a_factor(
    tmp_path: Path, clients: int, taking_part: int
) -> None:
    log, draw, written = PrivateLog(tmp_path / "private", clients), generator(1, "puts"), 0
    for server_round in range(1, 61):
        for client in draw.choice(clients, taking_part, replace=False):
            log.put(int(client), state(server_round))
        log.save(server_round)
        log.remove_stale()
        written += log._rows[server_round]
        live = sum(log._live.values())
        assert sum(log._rows.values()) <= 2 * live
    assert written <= 2 * 60 * taking_part


def test_memory_is_two_numbers_a_client() -> None:
    log = PrivateLog(Path("nowhere"), 10_000)
    assert log._file_K.nbytes + log._row_K.nbytes == 16 * 10_000
    assert not np.any(log._file_K >= 0)
