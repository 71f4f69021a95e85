"""`fedprompt deploy init | server | node | run`, as operators use them on their own machines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from federations import config_for, needs_processes, shared_of, simulate, write_clients
from fedprompt.config import to_yaml
from fedprompt.deploy.processes import descendants, end, free_port, processes_with

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), needs_processes]


class Shell:
    """Commands in the background, with their output in files; all ended in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = {"FEDPROMPT_TEST": str(folder)}
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.out").open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "fedprompt", "deploy", *arguments],
                env={**os.environ, **self.mark},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)
        return process

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text()

    def wait_for(self, name: str, words: str, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 240
        while words not in self.said(name):
            assert process.poll() is None, self.said(name)
            assert time.monotonic() < deadline, self.said(name)
            time.sleep(0.2)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path)
    yield made
    for process in made.started:
        end(process.pid, signal.SIGTERM)
    for process in made.started:
        process.wait(timeout=60)
    assert processes_with(f"FEDPROMPT_TEST={tmp_path}") == [], "each side ends all that it started"


def test_three_sides_and_a_superlink_that_dies(tmp_path: Path, shell: Shell) -> None:
    write_clients(tmp_path / "images", 2)
    config = config_for(tmp_path / "images", tmp_path / "run", clients=2)
    text = to_yaml(config).replace(str(tmp_path / "images" / "client"), "/elsewhere/client")
    lines = [line for line in text.splitlines() if "/elsewhere/" not in line]
    lines[lines.index("  folders:")] = "  folders: []"
    (tmp_path / "experiment.yaml").write_text("\n".join(lines) + "\n")

    made = tmp_path / "fed"
    port, node_ports = str(free_port()), [str(free_port()) for _ in range(2)]
    init = shell.start("init", "init", str(made), "--host", "127.0.0.1", "--nodes", "2",
                       "--port", port)  # fmt: skip
    assert init.wait() == 0, shell.said("init")
    assert "fedprompt deploy node federation/node-1" in shell.said("init")

    # The SuperLink's own port is 8000 unless federation.json says otherwise.
    settings = made / "server" / "federation.json"
    settings.write_text(settings.read_text().replace("8000", str(free_port())))
    server = shell.start("server", "server", str(made / "server"), "--host", "127.0.0.1")
    shell.wait_for("server", "ready for 2 nodes", server)
    for k, node_port in enumerate(node_ports):
        shell.start(
            f"node-{k}", "node", str(made / f"node-{k}"), "--port", node_port,
            "--data", str(tmp_path / "images" / f"client-{k}"), "--device", "cpu",
        )  # fmt: skip
    run = shell.start("run", "run", str(made / "server"), str(tmp_path / "experiment.yaml"))
    shell.wait_for("run", "client 1 has joined", run)
    (superlink,) = (
        child for child in descendants(server.pid)
        if b"flower-superlink" in Path(f"/proc/{child}/cmdline").read_bytes()
    )  # fmt: skip
    end(superlink, signal.SIGKILL)
    assert run.wait(timeout=400) == 0, shell.said("run") + shell.said("server")
    assert "superlink has ended with status -9" in shell.said("server")
    assert shared_of(tmp_path / "run") == shared_of(simulate(config, tmp_path / "twin"))


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    for arguments, words in (
        (["server", str(tmp_path)], "is /"),
        (["node", str(tmp_path)], "from 'fedprompt deploy init'?"),
        (["run", str(tmp_path)], "give an experiment or --resume RUN."),
        (["local"], "give an experiment"),
        (["local", "--resume", str(tmp_path)], "holds no deployment's run"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "fedprompt", "deploy", *arguments],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
