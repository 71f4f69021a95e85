"""`fedprompt deploy init | server | node | run`, as operators use them on their own machines."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprompt.config.schema import to_yaml
from fedprompt.deploy.folders import init
from fedprompt.deploy.processes import descendants, end, free_port
from tests.support.federations import (
    config_for,
    needs_processes,
    shared_of,
    simulate,
    write_clients,
)
from tests.support.shells import Shell

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), needs_processes]


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with Shell(tmp_path) as made:
        yield made


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
    init(tmp_path, ["fed"], nodes=1, port=9092, days=1)
    for arguments, words in (
        (["server", str(tmp_path)], "is /"),
        (["node", str(tmp_path)], "from 'fedprompt deploy init'?"),
        (["run", str(tmp_path)], "give an experiment or --resume RUN."),
        (["node", str(tmp_path / "node-0"), "--data", "/none"], "there is no folder /none"),
        (["node", str(tmp_path / "node-0"), "--checkpoint", "/none"], "there is no file /none"),
        (["node", str(tmp_path / "node-0"), "--server", "fed"], "it must be host:port"),
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
