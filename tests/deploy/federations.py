"""Real federations for tests: processes on loopback, ended by their ids, and what they left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, MessageType

from fake_data import write_image_folder
from fedprompt.client_app import handle, server_round
from fedprompt.config import validate
from fedprompt.deploy import submit
from fedprompt.deploy.local import LocalFederation
from fedprompt.display import QuietDisplay
from fedprompt.grid import InlineGrid
from fedprompt.methods.base import Tensors
from fedprompt.private_log import PrivateLog
from fedprompt.run_folder import PRIVATE, RunFolder
from fedprompt.schema import Config
from fedprompt.server_app import Federation, run_server
from fedprompt.threads import use_threads
from fedprompt.workspace import Workspace

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
        "grid": {"threads": 1, "cohort_size": 1},
        "evaluation": {"local_only": False, "personal_on_global": False, "every": 100},
        "output": {"report": False, "dir": str(run)},
    }
    for key, value in sections.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) else value
    return validate(raw)


class Running:
    """A local federation with its nodes' folders, and the run that it works on."""

    def __init__(self, local: LocalFederation, config: Config) -> None:
        self.local, self.config = local, config
        assert config.output.dir is not None
        self.path = Path(config.output.dir)
        self.run_id = 0

    def start_node(self, client: int, server: str = "", **settings: Any) -> None:
        data = self.config.data.folders[client] if self.config.data.folders else None
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

    def log(self) -> str:
        path = self.path / submit.LOG
        return path.read_text() if path.is_file() else ""

    def lines(self) -> list[dict[str, Any]]:
        path = self.path / "metrics.jsonl"
        text = path.read_text() if path.is_file() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def wait_for(self, reached: Callable[[], object], what: str) -> None:
        """Wait until something holds; the run's and the processes' last words if it never does."""
        deadline = time.monotonic() + WAIT_S
        while not reached():
            self.local.processes.revive(5, print)
            if time.monotonic() > deadline:
                pytest.fail(f"{what} never came; the server's log:\n{self.log()}\n{self.words()}")
            time.sleep(0.1)

    def wait_for_end(self) -> None:
        self.wait_for(lambda: submit.is_complete(self.path), "the end of the run")

    def wait_for_round(self, server_round: int) -> None:
        self.wait_for(lambda: len(self.lines()) > server_round, f"round {server_round}")

    def wait_until_training(self, client: int, server_round: int) -> None:
        """Wait until a node has taken a round's training message."""
        log = self.local.processes.log(f"node-{client}")

        def taken() -> bool:
            before, _, after = log.read_text().rpartition(f"ROUND {server_round}]")
            return bool(before) and "Receiving: train" in after

        self.wait_for(taken, f"training of client {client} in round {server_round}")

    def words(self) -> str:
        logs = sorted(self.local.processes.logs.glob("*.log"))
        return "\n".join(f"== {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in logs)

    def private(self, client: int) -> dict[str, bytes]:
        """The newest private tensors on a node's disk."""
        from safetensors.torch import load_file

        folder = self.local.folder / f"node-{client}" / "state"
        newest = max(folder.rglob("round-*.safetensors"), key=lambda p: p.name)
        return {n: t.numpy().tobytes() for n, t in load_file(newest).items()}


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


def simulate(config: Config, folder: Path, absent: set[tuple[int, int]] = frozenset()) -> Path:  # type: ignore[assignment]
    """The same experiment in this process; in `absent` (client, round) nothing is trained."""
    config = replace(config, output=replace(config.output, dir=str(folder)))
    use_threads(config.grid)
    workspace = Workspace.open(config, progress=False)
    run = RunFolder.create(config)
    private = PrivateLog(run.path / PRIVATE, config.partition.clients)

    def answer(
        w: Workspace,
        clients: Sequence[int],
        messages: Sequence[Message],
        kept: Mapping[int, Tensors],
    ) -> tuple[list[Message], dict[int, Tensors]]:
        kind = messages[0].metadata.message_type
        if kind == MessageType.TRAIN and (clients[0], server_round(messages[0])) in absent:
            raise RuntimeError("away")
        return handle(w, clients, messages, kept)

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
    from fedprompt.run_folder import CHECKPOINT, read_checkpoint

    checkpoint = read_checkpoint(path / CHECKPOINT)
    return {n: t.numpy().tobytes() for n, t in checkpoint.shared.items()}


def private_of(path: Path, clients: int) -> list[dict[str, bytes]]:
    """A simulated run's private tensors at its last checkpoint, by client."""
    from fedprompt.run_folder import CHECKPOINT, read_checkpoint

    checkpoint = read_checkpoint(path / CHECKPOINT)
    log = PrivateLog(path / PRIVATE, clients)
    log.read(checkpoint.server_round, checkpoint.private)
    states = [log.get(c) for c in range(clients)]
    assert all(states)
    return [{n: t.numpy().tobytes() for n, t in (s or {}).items()} for s in states]
