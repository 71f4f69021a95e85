"""Real federations for tests: processes on the loopback interface, and what they write."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fedprompt.config.schema import Config
from fedprompt.deploy import submit
from fedprompt.deploy.connection import was_rejected
from fedprompt.deploy.local import LocalFederation
from fedprompt.experiment.validate import validate
from tests.support.fake_data import write_image_folder
from tests.support.federation_twins import dropped, private_of, shared_of, simulate

CLASSES = ("river", "beach", "harbor", "runway")
WAIT_S = 240.0
needs_processes = pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="processes are found through /proc"
)


def write_clients(folder: Path, clients: int = 3) -> list[Path]:
    """Write a folder of images per client, and `server` with test images."""
    for k in range(clients):
        counts = {name: 8 + k + c for c, name in enumerate(CLASSES)}
        write_image_folder(folder / f"client-{k}", counts, first=20 * k)
    write_image_folder(folder / "server", dict.fromkeys(CLASSES, 4), first=200)
    return [folder / f"client-{k}" for k in range(clients)]


def config_for(
    images: Path, run: Path, clients: int = 3, rounds: int = 3, **sections: Any
) -> Config:
    """An experiment on the folders of `write_clients`.

    Args:
        images: the folder that was given to `write_clients`.
        run: the run folder.
        clients: number of clients.
        rounds: number of rounds.
        sections: keys of sections, which take precedence.
    """
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
    """A run on real nodes, observed through the files that the server and the nodes write."""

    def __init__(self, config: Config) -> None:
        self.config = config
        assert config.output.dir is not None
        self.path = Path(config.output.dir)
        self.trained: set[tuple[int, int]] = set()

    def node_log(self, client: int) -> str:
        """The log of a node's SuperNode."""
        raise NotImplementedError

    def state_folder(self, client: int) -> Path:
        """The folder with a node's private tensors of all runs."""
        raise NotImplementedError

    def diagnosis(self) -> str:
        """The ends of all logs, for the message of a test that fails."""
        raise NotImplementedError

    def poll(self) -> None:
        """Note which client has trained in which round; called again and again while waiting."""
        for client in range(self.config.partition.clients):
            for path in self.private_files(client):
                self.trained.add((client, int(path.stem.removeprefix("round-"))))

    def log(self) -> str:
        """The server app's log."""
        path = self.path / submit.LOG
        return path.read_text() if path.is_file() else ""

    def lines(self) -> list[dict[str, Any]]:
        """The complete lines of `metrics.jsonl`."""
        path = self.path / "metrics.jsonl"
        text = path.read_text() if path.is_file() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def wait_for(self, holds: Callable[[], object], what: str, wait_s: float = WAIT_S) -> None:
        """Wait until a condition holds; the test fails with all logs if it does not in time."""
        deadline = time.monotonic() + wait_s
        while not holds():
            self.poll()
            if time.monotonic() > deadline:
                pytest.fail(
                    f"{what} did not happen; the server's log:\n{self.log()}\n{self.diagnosis()}"
                )
            time.sleep(0.1)

    def pause(self, seconds: float) -> None:
        """Wait for some time, and observe the run meanwhile."""
        until = time.monotonic() + seconds
        self.wait_for(lambda: time.monotonic() > until, "the time")

    def wait_for_end(self) -> None:
        """Wait until the run has finished."""
        self.wait_for(lambda: submit.is_complete(self.path), "the end of the run")

    def wait_for_round(self, server_round: int) -> None:
        """Wait until a round is over."""
        self.wait_for(lambda: len(self.lines()) > server_round, f"round {server_round}")

    def wait_until_training(self, client: int, server_round: int) -> None:
        """Wait until a node has received a round's training message."""

        def received() -> bool:
            # A random word follows the number of the round.
            before, _, after = self.node_log(client).rpartition(f"ROUND {server_round} ")
            return bool(before) and "Receiving: train" in after

        self.wait_for(received, f"training of client {client} in round {server_round}")

    def private_files(self, client: int) -> list[Path]:
        """The files with a node's private tensors of this run, by round."""
        path = self.path / submit.DEPLOYMENT
        if not path.is_file():
            return []
        folder = self.state_folder(client) / json.loads(path.read_text())["run"]
        return sorted(folder.rglob("round-*.safetensors"))

    def private(self, client: int) -> dict[str, bytes]:
        """The bytes of a node's newest private tensors of this run."""
        newest = self.private_files(client)[-1]
        return {n: t.numpy().tobytes() for n, t in load_file(newest).items()}

    def lost(self) -> set[tuple[int, int]]:
        """(client, round) of every update that did not count, according to the run itself."""
        absent = dropped(self.lines())
        without = re.findall(r"round (\d+): without clients \[(.*)\]", self.log())
        for number, missing in without:
            absent |= {(int(c), int(number)) for c in missing.split(",")}
        return absent

    def lost_and_nothing_else(self, twin: Path) -> set[tuple[int, int]]:
        """The updates that the run reports as lost, after a check that no others are.

        The run is compared with a simulation in the folder `twin` that lacks exactly these updates:
        shared tensors, the losses of every round and all clients' private tensors must be equal bit
        for bit. A client whose update arrived too late has trained in vain, and its private tensors
        have changed.
        """
        config, lines, lost = self.config, self.lines(), self.lost()
        assert [line["round"] for line in lines] == list(range(config.federation.rounds + 1))
        path = simulate(config, twin, lost, trained_in_vain=lost & self.trained)
        assert shared_of(self.path) == shared_of(path)
        expected = [json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()]
        for line, other in zip(lines, expected, strict=True):
            assert line["train"] == other["train"], line["round"]
        for client, tensors in enumerate(private_of(path, config.partition.clients)):
            assert self.private(client) == tensors, client
        return lost


class Running(Watched):
    """A local federation, and the run that it works on."""

    def __init__(self, local: LocalFederation, config: Config) -> None:
        super().__init__(config)
        self.local = local
        self.run_id = 0
        self.states: dict[int, Path] = {}

    def node_log(self, client: int) -> str:
        return self.local.processes.log(f"node-{client}").read_text()

    def state_folder(self, client: int) -> Path:
        return self.states.get(client, self.local.folder / f"node-{client}" / "state")

    def poll(self) -> None:
        super().poll()
        processes = self.local.processes
        processes.restart_exited(5, lambda name, _: was_rejected(processes.log(name)))

    def start_node(self, client: int, server: str = "", **settings: Any) -> None:
        data = self.config.data.folders[client] if self.config.data.folders else None
        if "state-dir" in settings:
            self.states[client] = Path(settings["state-dir"])
        self.local.start_node(client, {"data": data, "device": "cpu", **settings}, server)

    def kill_node(self, client: int) -> None:
        """Kill a SuperNode, its worker and all processes that they have started."""
        self.local.processes.kill(f"node-{client}")
        self.local.processes.kill(f"worker-{client}")

    def begin(self) -> None:
        """Submit the run."""
        self.run_id = self.local.submit(submit.settings_of(submit.new_run(self.config)))

    def resume(self) -> None:
        """Submit the run again, to resume it."""
        self.run_id = self.local.submit(submit.settings_to_resume(self.path))

    def diagnosis(self) -> str:
        return last_words(self.local.processes.logs)


def last_words(logs: Path) -> str:
    """The ends of all log files in a folder."""
    paths = sorted(logs.glob("*.log"))
    return "\n".join(f"== {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in paths)


@contextmanager
def federation(
    folder: Path, config: Config, nodes: Sequence[int], environment: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """A running server and some running nodes, of which no process is left in the end.

    Args:
        folder: the federation's files go to the sub-folder `f`.
        config: the experiment that will be run.
        nodes: the clients whose nodes are started.
        environment: variables of all processes.
    """
    local = LocalFederation(folder / "f", config.partition.clients, environment)
    with local:
        local.start_server()
        running = Running(local, config)
        for client in nodes:
            running.start_node(client)
        yield running
    assert local.processes.alive() == []
