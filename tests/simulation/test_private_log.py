"""Private tensors on disk: what was put comes back bit for bit, whatever happens in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from safetensors.torch import load_file, save

from fedprompt.errors import UserError
from fedprompt.files import write_bytes
from fedprompt.methods.base import Tensors
from fedprompt.rng import generator
from fedprompt.simulation import private_log
from fedprompt.simulation.private_log import PrivateLog

AWKWARD = torch.tensor([[0.1, -0.0], [1e-45, 3.4e38]])


def state(value: float) -> Tensors:
    return {"ctx": torch.full((2, 3), value), "theta": torch.tensor(value / 3)}


def same(ours: Tensors | None, theirs: Tensors | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return ours.keys() == theirs.keys() and all(
        ours[n].shape == theirs[n].shape
        and ours[n].numpy().tobytes() == theirs[n].numpy().tobytes()
        for n in ours
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


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


# Crashes


class Crash(BaseException):
    """The process ends here."""


class AgainstADict(RuleBasedStateMachine):
    """Puts, checkpoints and crashes at every step of one, against what a dict would hold."""

    CLIENTS = 12

    def __init__(self) -> None:
        super().__init__()
        self._folder = TemporaryDirectory()
        self.folder = Path(self._folder.name) / "private"

    def teardown(self) -> None:
        self._folder.cleanup()

    @initialize()
    def start(self) -> None:
        self.now: dict[int, Tensors] = {}
        self.durable: dict[int, Tensors] = {}
        self.checkpoint: tuple[int, str] | None = None
        self.round = 0
        self.put_rows = self.written_rows = 0
        self._open()

    def _open(self) -> None:
        self.log = PrivateLog(self.folder, self.CLIENTS)
        if self.checkpoint is None:
            self.log.clear()
        else:
            self.log.restore(*self.checkpoint)
        self.now = dict(self.durable)
        self.round = self.checkpoint[0] if self.checkpoint else 0

    @rule(
        clients=st.sets(st.integers(0, CLIENTS - 1), min_size=1, max_size=6), value=st.floats(0, 9)
    )
    def put(self, clients: set[int], value: float) -> None:
        for client in clients:
            self.now[client] = state(value + client)
            self.log.put(client, self.now[client])

    @rule(
        gap=st.integers(1, 3), crash=st.sampled_from(["", "", "write", "saved", "sealed", "half"])
    )
    def save(self, gap: int, crash: str) -> None:
        self.round += gap
        self.put_rows += len(self.log._pending)
        with pytest.MonkeyPatch.context() as patch:
            if crash == "write":
                patch.setattr(os, "replace", _raise)
            try:
                digest = self.log.save(self.round)
            except Crash:
                return self._open()
        self.written_rows += self.log._rows.get(self.round, 0)
        if crash == "saved":
            return self._open()
        self.checkpoint, self.durable = (self.round, digest), dict(self.now)
        dead = [f for f, live in self.log._live.items() if not live]
        if crash == "half" and dead:
            self.log._path(dead[0]).unlink()
        if crash in ("sealed", "half"):
            return self._open()
        self.log.remove_stale()
        return None

    @rule()
    def reopen(self) -> None:
        self._open()

    @invariant()
    def holds_what_the_dict_holds(self) -> None:
        for client in range(self.CLIENTS):
            assert same(self.log.get(client), self.now.get(client)), client

    @invariant()
    def writes_no_more_than_twice_what_was_put(self) -> None:
        assert self.written_rows <= 2 * self.put_rows


def _raise(*_: object) -> None:
    raise Crash


TestAgainstADict = AgainstADict.TestCase
TestAgainstADict.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True
)


def play(folder: Path, rounds: int = 4) -> None:
    """A run's way with the store, from its last checkpoint on: seeded puts, one file, one seal."""
    kept = folder / "checkpoint.json"
    log, first = PrivateLog(folder / "private", 10), 1
    if kept.is_file():
        last, digest = json.loads(kept.read_text())
        log.restore(last, digest)
        first = last + 1
    else:
        log.clear()
    for server_round in range(first, rounds + 1):
        for client in generator(3, "puts", server_round).choice(10, 4, replace=False):
            before = log.get(int(client)) or state(0)
            log.put(int(client), {n: t * 0.5 + server_round for n, t in before.items()})
        digest = log.save(server_round)
        write_bytes(kept, json.dumps([server_round, digest]).encode())
        log.remove_stale()


def killed_at(call: int, folder: Path) -> bool:
    """`play` in a process that kills itself before its `call`-th change of the disk."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(change: Any) -> Any:
            def dies(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*arguments, **options)

            return dies

        for name in ("replace", "fsync", "chmod"):
            setattr(os, name, counted(getattr(os, name)))
        for name in ("unlink", "write_bytes", "mkdir"):
            setattr(Path, name, counted(getattr(Path, name)))
        play(folder)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_killed_at_every_single_step(tmp_path: Path) -> None:
    """A real kill -9 before each change of the disk, once; the end is the unbroken one's bytes."""
    (tmp_path / "unbroken").mkdir()
    play(tmp_path / "unbroken")
    expected = contents(tmp_path / "unbroken" / "private")
    kills = 0
    while True:
        folder = tmp_path / "killed"
        folder.mkdir()
        if not killed_at(kills + 1, folder):
            break
        play(folder)
        assert contents(folder / "private") == expected, f"killed at change {kills + 1}"
        shutil.rmtree(folder)
        kills += 1
    assert kills > 40, "each round writes, syncs and moves two files, and cleans"


# Errors


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
    tensors = load_file(log._path(2))
    write_bytes(log._path(1), save({n: t[:2] for n, t in tensors.items()}))
    with pytest.raises(UserError, match="missing or were changed"):
        log.restore(2, digest)


def test_a_full_disk_and_a_folder_that_cannot_be_made_are_one_line(
    log: PrivateLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    log.put(1, state(1))
    with monkeypatch.context() as patch:
        patch.setattr(private_log, "write_bytes", full)
        with pytest.raises(UserError, match=r"No space left on device.*--resume") as caught:
            log.save(1)
    one_line(caught)
    shutil.rmtree(log.folder)
    log.folder.write_bytes(b"")
    with pytest.raises(UserError, match="cannot write") as caught:
        log.save(1)
    one_line(caught)
    log.folder.unlink()
    log.save(1)
    assert same(log.get(1), state(1)), "what could not be written is still there"


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


def test_memory_is_two_numbers_a_client() -> None:
    log = PrivateLog(Path("nowhere"), 10_000)
    assert log._file_K.nbytes + log._row_K.nbytes == 16 * 10_000
    assert not np.any(log._file_K >= 0)
