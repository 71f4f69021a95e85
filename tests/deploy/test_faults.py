"""Faults of real nodes and of the server: only the updates that the log reports are lost.

Processes are killed, disks are full, connections are cut. Each run is compared, bit for bit, with a
simulation that lacks exactly the updates that the run's own log reports as missing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprompt.deploy.guard import send_signal
from fedprompt.deploy.processes import descendants
from tests.support.federation_twins import dropped
from tests.support.federations import (
    Running,
    config_for,
    federation,
    needs_processes,
    write_clients,
)
from tests.support.proxies import Proxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), needs_processes]


def server_app(running: Running) -> int:
    """The id of the running server app."""
    for child in descendants(running.local.processes.running["superexec"].pid):
        with contextlib.suppress(OSError):
            if b"flwr-serverapp" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
    raise AssertionError("no server app")


def test_a_node_killed_during_a_round_returns(tmp_path: Path) -> None:
    write_clients(tmp_path / "images")
    config = config_for(
        tmp_path / "images", tmp_path / "run", rounds=9,
        federation={"timeout_s": 75, "min_replies": 2},
    )  # fmt: skip
    with federation(tmp_path, config, range(3)) as running:
        running.begin()
        running.wait_until_training(1, 2)
        running.kill_node(1)
        running.wait_for_round(2)
        assert "client 1: reply dropped" in running.log()
        assert (1, 2) in dropped(running.lines())
        # Flower rejects the node for most of a minute; it is restarted until it is admitted.
        running.start_node(1)
        running.wait_for_end()
        lost = running.lost_and_nothing_else(tmp_path / "twin")
        assert (1, 2) in lost
        assert {client for client, _ in lost} == {1}
        assert running.log().count("client 1 has joined") == 2
        assert running.lines()[-1]["clients"] == {"sampled": 3, "accepted": 3, "rejected": 0}


def test_a_node_that_joins_late(tmp_path: Path) -> None:
    write_clients(tmp_path / "images")
    config = config_for(
        tmp_path / "images", tmp_path / "run", rounds=6,
        federation={"node_wait_s": 45, "min_nodes": 2},
    )  # fmt: skip
    with federation(tmp_path, config, [0, 1]) as running:
        running.begin()
        running.wait_for(lambda: "starting without clients [2]" in running.log(), "the start")
        running.start_node(2)
        running.wait_for_end()
        lost = running.lost_and_nothing_else(tmp_path / "twin")
        sampled = {line["round"]: line["clients"]["sampled"] for line in running.lines()[1:]}
        first = min(r for r, clients in sampled.items() if clients == 3)
        assert lost == {(2, r) for r in range(1, first)}, (
            "no update is lost from the round in which it joins"
        )
        assert first > 1
        assert running.lines()[-1]["clients"] == {"sampled": 3, "accepted": 3, "rejected": 0}


def test_a_slow_node_and_one_that_never_replies(tmp_path: Path) -> None:
    write_clients(tmp_path / "images")
    config = config_for(
        tmp_path / "images", tmp_path / "run", rounds=5,
        federation={"timeout_s": 45, "min_replies": 2},
    )  # fmt: skip
    with federation(tmp_path, config, range(3)) as running:
        running.begin()
        running.wait_until_training(2, 2)
        worker = running.local.processes.running["worker-2"].pid
        os.kill(worker, signal.SIGSTOP)
        running.wait_for_round(2)
        assert "client 2: reply dropped: no reply" in running.log()
        os.kill(worker, signal.SIGCONT)  # its reply to round 2 is late and does not count
        running.wait_until_training(2, 4)
        late = running.lost()
        assert (2, 2) in late & running.trained, "trained too late, and stored by the node"
        assert late <= {(2, 2), (2, 3)}, "it continues with the current round or the next one"
        # Now the run ends without it.
        running.wait_until_training(2, 5)
        os.kill(worker, signal.SIGSTOP)
        running.wait_for_end()
        assert running.lost_and_nothing_else(tmp_path / "twin") == late | {(2, 5)}
        assert running.lines()[5]["clients"] == {"sampled": 3, "accepted": 2, "rejected": 1}


def test_a_short_network_cut_and_a_superlink_started_again_lose_nothing(tmp_path: Path) -> None:
    write_clients(tmp_path / "images")
    config = config_for(tmp_path / "images", tmp_path / "run", federation={"timeout_s": 240})
    with federation(tmp_path, config, [0, 1]) as running, Proxy(running.local.server.port) as proxy:
        running.start_node(2, server=f"127.0.0.1:{proxy.port}")
        running.begin()
        running.wait_until_training(2, 2)
        proxy.cut()
        time.sleep(15)
        proxy.restore()
        running.wait_until_training(0, 3)
        assert proxy.cuts > 0
        running.local.processes.kill("superlink")
        time.sleep(3)
        running.local.start_superlink()
        running.wait_for_end()
        assert running.lost_and_nothing_else(tmp_path / "twin") == set()


def test_the_server_app_and_then_everything_is_killed_and_resumed(tmp_path: Path) -> None:
    write_clients(tmp_path / "images")
    config = config_for(tmp_path / "images", tmp_path / "run", rounds=4)
    with federation(tmp_path, config, range(3)) as running:
        running.begin()
        running.wait_until_training(0, 2)
        send_signal(server_app(running), signal.SIGKILL)
        running.resume()
        running.wait_for_round(2)
        for child in running.local.processes.alive():
            send_signal(child, signal.SIGKILL)
    assert not (running.path / "summary.json").exists()
    with federation(tmp_path, config, range(3)) as running:
        running.resume()
        running.wait_for_end()
        assert "resuming after round" in running.log()
        assert running.lost_and_nothing_else(tmp_path / "twin") == set()


DYING = """
import os, signal, sys
from pathlib import Path
if any("flwr-serverapp" in part for part in sys.orig_argv) and not os.path.exists({flag!r}):
    written, write_bytes = [], Path.write_bytes
    def dying(self, content):
        if self.name.startswith(".checkpoint.safetensors."):
            written.append(self)
            if len(written) == 3:
                write_bytes(self, content[: len(content) // 2])
                open({flag!r}, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
        return write_bytes(self, content)
    Path.write_bytes = dying
"""


def test_the_server_app_is_killed_while_it_writes_a_checkpoint(tmp_path: Path) -> None:
    write_clients(tmp_path / "images")
    config = config_for(tmp_path / "images", tmp_path / "run")
    flag = tmp_path / "died"
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "sitecustomize.py").write_text(DYING.format(flag=str(flag)))
    path = [str(tmp_path / "python"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    with federation(tmp_path, config, range(3), environment) as running:
        running.begin()
        running.wait_for(flag.exists, "the server app's death")
        (half,) = running.path.glob(".checkpoint.safetensors.*.tmp")
        assert 0 < half.stat().st_size < (running.path / "checkpoint.safetensors").stat().st_size
        running.resume()
        running.wait_for_end()
        assert not half.exists()
        assert running.lost_and_nothing_else(tmp_path / "twin") == set()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system with 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no mount command: {error}")
    if mounted.returncode:
        pytest.skip(f"no right to mount a small disk: {mounted.stderr.strip()}")
    yield folder
    for _ in range(20):
        if not subprocess.run(["umount", str(folder)], capture_output=True, check=False).returncode:
            return
        time.sleep(0.5)
    pytest.fail(f"{folder} is still mounted")


def fill(disk: Path) -> Path:
    """Fill a disk; returns the file that does it."""
    path = disk / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as stream:
        while True:
            stream.write(b"x" * 4096)
    return path


def test_a_full_disk_on_a_node(tmp_path: Path, small_disk: Path) -> None:
    write_clients(tmp_path / "images")
    config = config_for(tmp_path / "images", tmp_path / "run", rounds=4)
    with federation(tmp_path, config, [0, 1]) as running:
        running.start_node(2, **{"state-dir": str(small_disk)})
        running.begin()
        running.wait_until_training(0, 2)
        filler = fill(small_disk)
        running.wait_for(lambda: dropped(running.lines()), "a dropped update")
        filler.unlink()
        running.wait_for_end()
        line = next(x for x in running.log().splitlines() if "client 2: reply dropped" in x)
        assert "cannot write private state" in line
        assert "No space left on device" in line
        assert str(small_disk) not in line, "the server must not learn a node's folders"
        assert "this node cannot take part" in running.local.processes.log("worker-2").read_text()
        lost = running.lost_and_nothing_else(tmp_path / "twin")
        assert lost
        assert {client for client, _ in lost} == {2}
        assert lost.isdisjoint(running.trained)
        assert (2, 4) not in lost


def test_a_full_disk_on_the_server(tmp_path: Path, small_disk: Path) -> None:
    write_clients(tmp_path / "images")
    config = config_for(tmp_path / "images", small_disk / "run")
    with federation(tmp_path, config, range(3)) as running:
        running.begin()
        running.wait_until_training(0, 2)
        filler = fill(small_disk)
        running.wait_for(
            lambda: running.local.status(running.run_id).startswith("finished"), "its failure"
        )
        filler.unlink()
        running.resume()
        running.wait_for_end()
        assert running.lost_and_nothing_else(tmp_path / "twin") == set()
