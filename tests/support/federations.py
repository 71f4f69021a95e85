"""Real federations for tests: processes on loopback, ended by their ids, and what they left."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message, MessageType

from fedprompt.config.schema import Config
from fedprompt.deploy import submit
from fedprompt.deploy.local import LocalFederation
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.rounds import run_server
from fedprompt.experiment.run_folder import RunFolder
from fedprompt.experiment.validate import validate
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.federation.client_app import handle, server_round
from fedprompt.federation.server_app import Federation
from fedprompt.messages import CLIENT_FAILED
from fedprompt.methods.base import Tensors
from fedprompt.reports.run_data import PRIVATE
from fedprompt.runtime import use_threads
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.simulation.private_log import PrivateLog
from fedprompt.workspace import Workspace
from tests.support.fake_data import write_image_folder

CLASSES = ("river", "beach", "harbor", "runway")
WAIT_S = 240.0
needs_processes = pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="processes are followed through /proc"
)


def write_clients(folder: Path, clients: int = 3) -> list[Path]:
    """A folder per client with images of its own, and `server` with test images."""
    for k in range(clients):
        counts = {name: 8 + k + c for c, name in enumerate(CLASSES)}
        write_image_folder(folder / f"client-{k}", counts, first=20 * k)
    write_image_folder(folder / "server", dict.fromkeys(CLASSES, 4), first=200)
    return [folder / f"client-{k}" for k in range(clients)]


def config_for(
    images: Path, run: Path, clients: int = 3, rounds: int = 3, **sections: Any
) -> Config:
    """An experiment on `write_clients`; `run` is its run folder."""
    raw: dict[str, Any] = {
        "experiment": "folders",
        "seed": 3,
        "backbone": {"model": "tiny", "device": "cpu"},
        "data": {
            "source": "client_folders",
            "title": "folders",
            "class_names": list(CLASSES),
            "folders": [str(images / f"client-{k}") for k in range(clients)],
            "root": str(images / "server"),
        },
        "partition": {"clients": clients},
        "method": {"name": "fedrsclip"},
        "strategy": {"name": "fedavg"},
        "training": {"lr": 0.05, "batch_size": 8},
        "federation": {"rounds": rounds, "timeout_s": 120},
        "simulation": {"threads": 1, "clients_per_block": 1},
        "evaluation": {"local_only": False, "personal_on_global": False, "every": 100},
        "output": {"report": False, "dir": str(run)},
        "protocols": ["global"],
    }
    for key, value in sections.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) else value
    return validate(raw)


class Watched:
    """A run of real nodes, by what it and they write."""

    def __init__(self, config: Config) -> None:
        self.config = config
        assert config.output.dir is not None
        self.path = Path(config.output.dir)
        self.trained: set[tuple[int, int]] = set()

    def node_log(self, client: int) -> str:
        """What a node's SuperNode has written."""
        raise NotImplementedError

    def state_folder(self, client: int) -> Path:
        """Where a node keeps its private tensors of all runs."""
        raise NotImplementedError

    def words(self) -> str:
        """The processes' last words."""
        raise NotImplementedError

    def look_after(self) -> None:
        """Called all the time while something is waited for: who has trained in which round."""
        for client in range(self.config.partition.clients):
            for path in self.private_files(client):
                self.trained.add((client, int(path.stem.removeprefix("round-"))))

    def log(self) -> str:
        path = self.path / submit.LOG
        return path.read_text() if path.is_file() else ""

    def lines(self) -> list[dict[str, Any]]:
        path = self.path / "metrics.jsonl"
        text = path.read_text() if path.is_file() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def wait_for(self, reached: Callable[[], object], what: str, wait: float = WAIT_S) -> None:
        """Wait until something holds; the run's and the processes' last words if it never does."""
        deadline = time.monotonic() + wait
        while not reached():
            self.look_after()
            if time.monotonic() > deadline:
                pytest.fail(f"{what} never came; the server's log:\n{self.log()}\n{self.words()}")
            time.sleep(0.1)

    def pause(self, seconds: float) -> None:
        """Let time go by."""
        until = time.monotonic() + seconds
        self.wait_for(lambda: time.monotonic() > until, "the time")

    def wait_for_end(self) -> None:
        self.wait_for(lambda: submit.is_complete(self.path), "the end of the run")

    def wait_for_round(self, server_round: int) -> None:
        self.wait_for(lambda: len(self.lines()) > server_round, f"round {server_round}")

    def wait_until_training(self, client: int, server_round: int) -> None:
        """Wait until a node has taken a round's training message."""

        def taken() -> bool:
            before, _, after = self.node_log(client).rpartition(f"ROUND {server_round}]")
            return bool(before) and "Receiving: train" in after

        self.wait_for(taken, f"training of client {client} in round {server_round}")

    def private_files(self, client: int) -> list[Path]:
        """This run's private tensors on a node's disk, by round."""
        path = self.path / submit.DEPLOYMENT
        if not path.is_file():
            return []
        folder = self.state_folder(client) / json.loads(path.read_text())["run"]
        return sorted(folder.rglob("round-*.safetensors"))

    def private(self, client: int) -> dict[str, bytes]:
        """The newest private tensors of this run on a node's disk."""
        from safetensors.torch import load_file

        newest = self.private_files(client)[-1]
        return {n: t.numpy().tobytes() for n, t in load_file(newest).items()}

    def lost(self) -> set[tuple[int, int]]:
        """(client, round) of every update that did not count, as the run itself says."""
        absent = dropped(self.lines())
        without = re.findall(r"round (\d+): without clients \[(.*)\]", self.log())
        for number, missing in without:
            absent |= {(int(c), int(number)) for c in missing.split(",")}
        return absent

    def lost_and_nothing_else(self, twin: Path) -> set[tuple[int, int]]:
        """The updates that the run says it misses, after a proof that it misses no others.

        Its twin is a simulation, in the folder `twin`, in which exactly those updates are missing:
        shared tensors, losses of every round and all clients' private tensors have the same bits. A
        client whose update came too late has trained in vain, and keeps its private tensors.
        """
        config, lines, lost = self.config, self.lines(), self.lost()
        assert [line["round"] for line in lines] == list(range(config.federation.rounds + 1))
        path = simulate(config, twin, lost, in_vain=lost & self.trained)
        assert shared_of(self.path) == shared_of(path)
        expected = [json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()]
        for line, other in zip(lines, expected, strict=True):
            assert line["train"] == other["train"], line["round"]
        for client, tensors in enumerate(private_of(path, config.partition.clients)):
            assert self.private(client) == tensors, client
        return lost


class Running(Watched):
    """A local federation with its nodes' folders, and the run that it works on."""

    def __init__(self, local: LocalFederation, config: Config) -> None:
        super().__init__(config)
        self.local = local
        self.run_id = 0
        self.states: dict[int, Path] = {}

    def node_log(self, client: int) -> str:
        return self.local.processes.log(f"node-{client}").read_text()

    def state_folder(self, client: int) -> Path:
        return self.states.get(client, self.local.folder / f"node-{client}" / "state")

    def look_after(self) -> None:
        super().look_after()
        self.local.processes.revive(5, print)

    def start_node(self, client: int, server: str = "", **settings: Any) -> None:
        data = self.config.data.folders[client] if self.config.data.folders else None
        if "state-dir" in settings:
            self.states[client] = Path(settings["state-dir"])
        self.local.start_node(client, {"data": data, "device": "cpu", **settings}, server)

    def kill_node(self, client: int) -> None:
        """SIGKILL to the SuperNode, its worker and everything that they have started."""
        self.local.processes.kill(f"node-{client}")
        self.local.processes.kill(f"worker-{client}")

    def begin(self) -> None:
        """Hand over the run."""
        self.run_id = self.local.submit(submit.settings_of(submit.new_run(self.config)))

    def go_on(self) -> None:
        """Hand over the rest of the run."""
        self.run_id = self.local.submit(submit.settings_to_resume(self.path))

    def words(self) -> str:
        return last_words(self.local.processes.logs)


def last_words(logs: Path) -> str:
    """The ends of all log files in a folder."""
    paths = sorted(logs.glob("*.log"))
    return "\n".join(f"== {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in paths)


@contextmanager
def federation(
    folder: Path, config: Config, nodes: Sequence[int], environment: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """A server and some of its nodes; in the end no process of it is left."""
    local = LocalFederation(folder / "f", config.partition.clients, environment)
    with local:
        local.start_server()
        running = Running(local, config)
        for client in nodes:
            running.start_node(client)
        yield running
    assert local.processes.alive() == []


def simulate(
    config: Config,
    folder: Path,
    absent: AbstractSet[tuple[int, int]] = frozenset(),
    in_vain: AbstractSet[tuple[int, int]] = frozenset(),
) -> Path:
    """The same experiment in this process, without the replies of `absent` (client, round).

    Nothing is trained there, but for those that are `in_vain` too: their private tensors change.
    """
    config = replace(config, output=replace(config.output, dir=str(folder)))
    use_threads(config.simulation)
    workspace = open_workspace(config)
    run = RunFolder.create(config)
    private = PrivateLog(run.path / PRIVATE, config.partition.clients)

    def answer(
        w: Workspace,
        clients: Sequence[int],
        messages: Sequence[Message],
        kept: Mapping[int, Tensors],
    ) -> tuple[list[Message], dict[int, Tensors]]:
        kind = messages[0].metadata.message_type
        if kind != MessageType.TRAIN or (clients[0], server_round(messages[0])) not in absent:
            return handle(w, clients, messages, kept)
        if (clients[0], server_round(messages[0])) not in in_vain:
            raise RuntimeError("away")
        changed = handle(w, clients, messages, kept)[1]
        return [Message(Error(CLIENT_FAILED, "too late"), reply_to=messages[0])], changed

    grid = InlineGrid(workspace, private, answer=answer)
    try:
        run_server(Federation(workspace, grid), run, QuietDisplay(), None, private)
    finally:
        grid.close()
        run.close()
    return run.path


def dropped(lines: Sequence[Mapping[str, Any]]) -> set[tuple[int, int]]:
    """(client, round) of every update that did not count, as the run's metrics have it."""
    return {(int(client), line["round"]) for line in lines for client in line.get("dropped", {})}


def shared_of(path: Path) -> dict[str, bytes]:
    """A run's shared tensors at its last checkpoint, bit for bit."""
    from fedprompt.experiment.checkpoint import read_checkpoint
    from fedprompt.reports.run_data import CHECKPOINT

    checkpoint = read_checkpoint(path / CHECKPOINT)
    return {n: t.numpy().tobytes() for n, t in checkpoint.shared.items()}


def private_of(path: Path, clients: int) -> list[dict[str, bytes]]:
    """A simulated run's private tensors at its last checkpoint, by client."""
    from fedprompt.experiment.checkpoint import read_checkpoint
    from fedprompt.reports.run_data import CHECKPOINT

    checkpoint = read_checkpoint(path / CHECKPOINT)
    log = PrivateLog(path / PRIVATE, clients)
    log.read(checkpoint.server_round, checkpoint.private)
    states = [log.get(c) for c in range(clients)]
    assert all(states)
    return [{n: t.numpy().tobytes() for n, t in (s or {}).items()} for s in states]
