"""What a round costs follows the clients that take part: the same counts at 200 and 2,000 clients.

Counted, not timed: messages, reads of the private store, bytes written, memory of Python objects.
"""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedprompt import files
from fedprompt.data.features.table import FeatureTable
from fedprompt.data.partition import make_partition
from fedprompt.experiment import run_folder
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.logs import ProgressOfTest
from fedprompt.experiment.rounds import run_server
from fedprompt.experiment.run_folder import RunFolder
from fedprompt.experiment.summary import _zero_shot
from fedprompt.federation.server_app import Federation
from fedprompt.files import client_log, rows
from fedprompt.files.places import PENDING
from fedprompt.files.rows import HEADER, read_row
from fedprompt.methods.base import Tensors
from fedprompt.reports.run_data import METRICS, PRIVATE, TESTED
from fedprompt.rng import generator
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.simulation.private_log import PrivateLog
from fedprompt.workspace import Workspace
from tests.support.builders import fake_dataset, random_clip, small_config

PARTICIPANTS, ROUNDS, IMAGES = 10, 12, 12_000
FEW, MANY = 200, 2_000
MakeWorkspace = Callable[..., Workspace]


@pytest.fixture(scope="module")
def make_workspace() -> MakeWorkspace:
    """Workspaces of any number of clients on one invented data set."""
    clip, dataset = random_clip(), fake_dataset(IMAGES)
    draw = generator(0, "fake features")
    centres_CD = draw.standard_normal((6, clip.embed_dim))
    noise_ND = draw.standard_normal((IMAGES, clip.embed_dim))
    features_ND = (centres_CD[dataset.labels_N] + noise_ND).astype(np.float32)

    def make(clients: int, **evaluation: Any) -> Workspace:
        config = small_config(
            partition={"clients": clients, "scheme": "iid"},
            federation={"rounds": ROUNDS, "fraction": PARTICIPANTS / clients},
            evaluation={
                "clients": "participants", "personal_on_global": False, "local_only": False
            } | evaluation,
        )  # fmt: skip
        partition = make_partition(dataset, config.partition, config.seed)
        return Workspace(config, clip, dataset, partition, [FeatureTable(features_ND)])

    return make


@dataclass
class Counts:
    """What happened in each round, by round."""

    messages: Counter[int] = field(default_factory=Counter)
    reads: Counter[int] = field(default_factory=Counter)
    opened: Counter[int] = field(default_factory=Counter)
    written: list[tuple[str, int]] = field(default_factory=list)
    pending: dict[int, int] = field(default_factory=dict)
    memory: dict[int, tuple[int, int]] = field(default_factory=dict)
    round: int = 0


class Counting(InlineGrid):
    """A grid that counts messages."""

    counts: Counts
    exchanges: int | None = None
    """Exchanges after which the process dies."""

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        sent: list[Message] = list(messages)
        if self.exchanges is not None:
            if self.exchanges == 0:
                raise Stop
            self.exchanges -= 1
        self.counts.messages[self.counts.round] += len(sent)
        return super().send_and_receive(sent, timeout=timeout)


class CountingLog(PrivateLog):
    """A store that counts reads."""

    counts: Counts

    def get(self, client: int) -> Tensors | None:
        self.counts.reads[self.counts.round] += 1
        return super().get(client)


class Watching(QuietDisplay):
    """Tells the counters which round it is; may stop the run in the middle of one."""

    def __init__(self, counts: Counts, log: PrivateLog, stop_after: int | None) -> None:
        super().__init__()
        self.counts, self.log, self.stop_after = counts, log, stop_after

    def round(self, record: Any, eta_s: float | None) -> None:
        done = record["round"]
        self.counts.pending[done] = self.log._places.total.get(PENDING, 0)
        if tracemalloc.is_tracing():
            self.counts.memory[done] = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
        self.counts.round = done + 1
        if done == self.stop_after:
            raise Stop


class Stop(Exception):
    """The run is interrupted."""


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the server of a workspace in a folder, counting."""

    def start(
        workspace: Workspace,
        name: str,
        stop_after: int | None = None,
        exchanges: int | None = None,
    ) -> Any:
        counts = Counts()

        def write(path: Path, content: bytes, *, mode: int = 0o644) -> None:
            counts.written.append((path.name, len(content)))
            files.write_bytes(path, content, mode=mode)

        def read(*arguments: Any) -> bytes:
            counts.opened[counts.round] += 1
            return read_row(*arguments)

        def publish(temporary: Path, path: Path) -> None:
            counts.written.append((path.name, temporary.stat().st_size))
            files.publish(temporary, path)

        path = tmp_path / name
        config = replace(workspace.config, output=replace(workspace.config.output, dir=str(path)))
        folder = (
            RunFolder.resume(path)[0] if (path / METRICS).is_file() else RunFolder.create(config)
        )
        log = CountingLog(path / PRIVATE, workspace.num_clients)
        grid = Counting(workspace, log)
        log.counts = grid.counts = counts
        grid.exchanges = exchanges
        federation = Federation(workspace, grid)
        with monkeypatch.context() as patch:
            patch.setattr(run_folder, "write_bytes", write)
            patch.setattr(rows, "publish", publish)
            patch.setattr(client_log, "read_row", read)
            try:
                run_server(
                    federation,
                    folder,
                    Watching(counts, log, stop_after),
                    folder.load_checkpoint(),
                    log,
                )
            except Stop:
                pass
            finally:
                folder.close()
        return counts, federation, log, path

    return start


def states(log: PrivateLog) -> dict[int, dict[str, bytes]]:
    kept = {c: log.get(c) for c in range(log.num_clients)}
    return {c: {n: t.numpy().tobytes() for n, t in s.items()} for c, s in kept.items() if s}


def test_messages_and_reads_follow_the_participants(
    make_workspace: MakeWorkspace, play: Callable[..., Any]
) -> None:
    few, many = (play(make_workspace(k), f"run{k}")[0] for k in (FEW, MANY))
    for counts, clients in ((few, FEW), (many, MANY)):
        # Trained, then tested; everyone is tested in the last round, nobody was asked who he is.
        expected = dict.fromkeys(range(1, ROUNDS), 2 * PARTICIPANTS)
        assert counts.messages == expected | {ROUNDS: PARTICIPANTS + clients}
        assert counts.reads == counts.messages
        assert counts.pending == dict.fromkeys(range(ROUNDS + 1), 0)
        for server_round in range(1, ROUNDS):
            # Per tensor, one reading for each client that trained before, and one for each of at
            # most as many rows that are moved. What has just trained is part of no file yet.
            assert counts.opened[server_round] <= 2 * PARTICIPANTS


def test_bytes_of_a_checkpoint_follow_the_participants(
    make_workspace: MakeWorkspace, play: Callable[..., Any]
) -> None:
    few, many = (play(make_workspace(k), f"run{k}") for k in (FEW, MANY))
    sizes = [
        # Of all rounds but the last, which tests everyone.
        set([n for name, n in run[0].written if name.startswith("checkpoint")][:ROUNDS])
        for run in (few, many)
    ]
    assert max(map(len, sizes)) <= 3
    assert abs(max(sizes[0]) - max(sizes[1])) <= 8, "but for the digits of totals"
    # Beside its numbers, a tensor has the header of an .npy file and 64 bytes in the index.
    private = few[1].workspace.start_private(0).values()
    row = sum(128 + 64 + 4 * t.numel() for t in private)
    for run in (few, many):
        written = [n for name, n in run[0].written if name.startswith("round-")]
        assert len(written) == ROUNDS
        assert max(written) <= 2 * PARTICIPANTS * row + HEADER + 100
    lines = [
        [len(line) for line in (run[3] / METRICS).read_text().splitlines()[1:ROUNDS]]
        for run in (few, many)
    ]
    assert max(lines[1]) < 1.2 * max(lines[0])


def test_python_memory_of_a_round_follows_the_participants(
    make_workspace: MakeWorkspace, play: Callable[..., Any]
) -> None:
    peaks, growth = {}, {}
    for clients in (FEW, MANY):
        workspace = make_workspace(clients)
        play(workspace, f"warm{clients}", stop_after=2)
        tracemalloc.start()
        try:
            memory = play(workspace, f"run{clients}", stop_after=ROUNDS - 1)[0].memory
        finally:
            tracemalloc.stop()
        peaks[clients] = max(memory[r][1] - memory[r - 1][0] for r in range(3, ROUNDS))
        growth[clients] = (memory[ROUNDS - 1][0] - memory[3][0]) / (ROUNDS - 4)
    # Sampling permutes the ids of all clients: 8 bytes each, and no object for any of them.
    assert peaks[MANY] <= peaks[FEW] + 16 * (MANY - FEW)
    assert max(growth.values()) < 16_384, "bytes a round"


def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(
    make_workspace: MakeWorkspace, play: Callable[..., Any]
) -> None:
    workspace = make_workspace(FEW)
    _, whole, log, path = play(workspace, "whole")
    for stop_after in (0, 5, 9):
        play(workspace, "broken", stop_after=stop_after)
    _, federation, again, broken = play(workspace, "broken")
    assert federation.shared.keys() == whole.shared.keys()
    for name, tensor in whole.shared.items():
        assert federation.shared[name].numpy().tobytes() == tensor.numpy().tobytes()
    assert states(again) == states(log)
    assert len(states(log)) > PARTICIPANTS
    assert (broken / METRICS).read_bytes() == (path / METRICS).read_bytes()
    for file in (path / PRIVATE).iterdir():
        assert (broken / PRIVATE / file.name).read_bytes() == file.read_bytes()
    assert len(list((broken / PRIVATE).iterdir())) == len(list((path / PRIVATE).iterdir()))


@pytest.mark.parametrize(("tested", "bound"), [(0, "clients"), (1, "bytes"), (3, "clients")])
def test_a_test_of_everyone_goes_on_where_it_was(
    make_workspace: MakeWorkspace,
    play: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tested: int,
    bound: str,
) -> None:
    """Killed between the exchanges of the last round's test: no client trains or answers again."""
    workspace = make_workspace(FEW)
    shapes = {**workspace.shared_shapes, **workspace.extras_shapes}
    message = 4 * sum(math.prod(shape) for shape in shapes.values())
    name, limit = {
        "clients": ("CLIENTS_AT_ONCE", 64),
        "bytes": ("MESSAGE_BYTES_AT_ONCE", 65 * message - 1),
    }[bound]
    monkeypatch.setattr(f"fedprompt.federation.client_tests.{name}", limit)
    _, whole, log, path = play(workspace, "whole")
    # In each round before the last, participants train and are tested; in the last one they train,
    # and everyone is tested in four exchanges.
    play(workspace, "broken", exchanges=2 * (ROUNDS - 1) + 1 + tested)
    counts, federation, again, broken = play(workspace, "broken")
    assert counts.messages.total() == FEW - 64 * tested
    assert (broken / METRICS).read_bytes() == (path / METRICS).read_bytes()
    assert states(again) == states(log)
    assert federation.asked == whole.asked
    for name, tensor in whole.shared.items():
        assert federation.shared[name].numpy().tobytes() == tensor.numpy().tobytes()


def test_results_of_other_tensors_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    folder, state = RunFolder(tmp_path / "run"), ["a"]
    record = ProgressOfTest(folder, lambda: state[0])
    record.add("3", [1, 2], {1: {"tested": 4, "correct": 3}})
    record.add("3", [5], {5: {"tested": 2, "loss": 1 / 3}})
    for one in (record, ProgressOfTest(folder, lambda: state[0])):
        assert one.find("3", [1, 2]) == {1: {"tested": 4, "correct": 3}}
        assert one.find("3", [5]) == {5: {"tested": 2, "loss": 1 / 3}}
        assert one.find("3", [1]) is None
        assert one.find("4", [5]) is None
    state[0] = "b"
    assert record.find("3", [5]) is None
    record.add("3", [5], {})
    assert len(folder.lines(TESTED)) == 1, "those of the earlier test are removed"


def test_lines_name_whom_they_tested(
    make_workspace: MakeWorkspace, play: Callable[..., Any]
) -> None:
    workspace = make_workspace(FEW)
    _, federation, _, path = play(workspace, "run")
    lines = RunFolder(path).lines(METRICS)
    assert lines[0]["personal"] is None, "nobody has trained yet"
    for line in lines[1:ROUNDS]:
        assert line["personal"]["clients"] == federation.strategy.sample(line["round"])
    final = lines[ROUNDS]["personal"]
    assert final["clients"] == list(range(FEW))
    for line in lines[1:]:
        personal = line["personal"]
        assert len(personal["accuracy"]) == len(personal["clients"]) == personal["clients_tested"]
        assert personal["mean"] == pytest.approx(np.mean(personal["accuracy"]))


def test_a_participant_whose_reply_was_dropped_is_not_tested(make_workspace: MakeWorkspace) -> None:
    federation = Federation(workspace := make_workspace(FEW), InlineGrid(workspace))
    federation.join()
    federation.train_round(1)
    dropped = federation.strategy.sampled[3]
    federation.strategy.rejected = {dropped: "not finite"}
    rest = [c for c in federation.strategy.sampled if c != dropped]
    assert federation.strategy.participants == rest


def test_everyone_is_tested_in_parts(
    make_workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts in which messages are sent, and zero-shot scores made, change no number."""
    workspace = make_workspace(FEW, personal_on_global=True)
    results = []
    for at_once in (1000, 64):
        monkeypatch.setattr("fedprompt.federation.client_tests.CLIENTS_AT_ONCE", at_once)
        monkeypatch.setattr("fedprompt.experiment.summary.CLIENTS_AT_ONCE", at_once)
        federation = Federation(workspace, Counting(workspace))
        federation.grid.counts = Counts()  # type: ignore[attr-defined]
        federation.join()
        results.append((federation.evaluate(0), _zero_shot(workspace)))
    assert results[0] == results[1]
    assert results[0][0]["personal_on_global"]["clients"] == list(range(FEW))
    assert results[0][1]["personal"]["clients"] == list(range(FEW))
