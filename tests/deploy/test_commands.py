"""The commands `fedprompt deploy init`, `server`, `node` and `run`, as administrators use them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprompt.config.schema import to_yaml
from fedprompt.deploy.guard import send_signal
from fedprompt.deploy.new_federation import create_federation
from fedprompt.deploy.processes import descendants, free_port
from tests.support.federation_twins import shared_of, simulate
from tests.support.federations import config_for, needs_processes, write_clients
from tests.support.shells import Shell

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), needs_processes]


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with Shell(tmp_path) as shell:
        yield shell


def test_a_server_two_nodes_and_a_superlink_that_is_killed(tmp_path: Path, shell: Shell) -> None:
    write_clients(tmp_path / "images", 2)
    config = config_for(tmp_path / "images", tmp_path / "run", clients=2)
    text = to_yaml(config).replace(str(tmp_path / "images" / "client"), "/elsewhere/client")
    lines = [line for line in text.splitlines() if "/elsewhere/" not in line]
    lines[lines.index("  folders:")] = "  folders: []"
    (tmp_path / "experiment.yaml").write_text("\n".join(lines) + "\n")

    federation = tmp_path / "fed"
    port, node_ports = str(free_port()), [str(free_port()) for _ in range(2)]
    init = shell.start("init", "init", str(federation), "--host", "127.0.0.1", "--nodes", "2",
                       "--port", port)  # fmt: skip
    assert init.wait() == 0, shell.output("init")
    assert "fedprompt deploy node federation/node-1" in shell.output("init")

    # The SuperLink's own port is 8000 unless federation.json says otherwise.
    settings = federation / "server" / "federation.json"
    settings.write_text(settings.read_text().replace("8000", str(free_port())))
    server = shell.start("server", "server", str(federation / "server"), "--host", "127.0.0.1")
    shell.wait_for("server", "ready for 2 nodes", server)
    for k, node_port in enumerate(node_ports):
        shell.start(
            f"node-{k}", "node", str(federation / f"node-{k}"), "--port", node_port,
            "--data", str(tmp_path / "images" / f"client-{k}"), "--device", "cpu",
        )  # fmt: skip
    run = shell.start("run", "run", str(federation / "server"), str(tmp_path / "experiment.yaml"))
    shell.wait_for("run", "client 1 has joined", run)
    (superlink,) = (
        child for child in descendants(server.pid)
        if b"flower-superlink" in Path(f"/proc/{child}/cmdline").read_bytes()
    )  # fmt: skip
    send_signal(superlink, signal.SIGKILL)
    assert run.wait(timeout=400) == 0, shell.output("run") + shell.output("server")
    assert "superlink exited with status -9" in shell.output("server")
    assert shared_of(tmp_path / "run") == shared_of(simulate(config, tmp_path / "twin"))


def test_mistakes_are_reported_in_one_line(tmp_path: Path) -> None:
    create_federation(tmp_path, ["fed"], nodes=1, port=9092, days=1)
    for arguments, words in (
        (["server", str(tmp_path)], "federation.json"),
        (["node", str(tmp_path)], "'fedprompt deploy init'"),
        (["run", str(tmp_path)], "--resume RUN"),
        (["node", str(tmp_path / "node-0"), "--data", "/none"], "--data: there is no folder /none"),
        (["node", str(tmp_path / "node-0"), "--checkpoint", "/none"], "--checkpoint"),
        (["node", str(tmp_path / "node-0"), "--server", "fed"], "host:port"),
        (["local"], "--resume RUN"),
        (["local", "--resume", str(tmp_path)], "deployment.json"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "fedprompt", "deploy", *arguments],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
