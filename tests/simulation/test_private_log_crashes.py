"""The log of private tensors against a dict, through crashes and kills at every step."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fedprompt.files import write_bytes
from fedprompt.files.places import PENDING
from fedprompt.files.rows import RowWriter
from fedprompt.methods.base import Tensors
from fedprompt.rng import generator
from fedprompt.simulation.private_log import PrivateLog
from tests.support.private_states import contents, same, state


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
            # `keys` stays as it is, so the log holds what it has of it already.
            self.now[client] = {**state(value + client), "keys": torch.full((9,), float(client))}
            self.log.put(client, self.now[client])

    @rule(
        gap=st.integers(1, 3), crash=st.sampled_from(["", "", "write", "saved", "sealed", "half"])
    )
    def save(self, gap: int, crash: str) -> None:
        self.round += gap
        put = self.log._places.total.get(PENDING, 0)
        with pytest.MonkeyPatch.context() as patch:
            if crash == "write":
                patch.setattr(os, "replace", _raise)
            try:
                digest = self.log.save(self.round)
            except Crash:
                return self._open()
        assert self.log._places.total.get(self.round, 0) <= 2 * put
        if crash == "saved":
            return self._open()
        self.checkpoint, self.durable = (self.round, digest), dict(self.now)
        dead = [f for f, live in self.log._places.live.items() if not live]
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
            before = log.get(int(client)) or {**state(0), "keys": torch.full((9,), float(client))}
            after = {n: t if n == "keys" else t * 0.5 + server_round for n, t in before.items()}
            log.put(int(client), after)
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
        RowWriter.finish = counted(RowWriter.finish)
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
    assert kills > 40, "each round completes, syncs and moves two files, and cleans"
