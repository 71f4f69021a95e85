"""A group of processes ends with its owner, and a folder has one owner."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedprompt.deploy import guard
from fedprompt.deploy.folders import read_node_folder
from fedprompt.deploy.guard import kill_group, processes_with
from fedprompt.deploy.local import resume_local
from fedprompt.deploy.new_federation import create_federation
from fedprompt.deploy.ownership import MARK, OWNER, Ownership, in_use
from fedprompt.deploy.processes import Processes, free_port
from fedprompt.deploy.supervise import run_node
from fedprompt.errors import UserError
from fedprompt.experiment.display import QuietDisplay
from tests.support.federations import needs_processes

FAMILY = "sleep 600 & setsid sleep 600 & wait"
"""A process with two children, one of which is in a session of its own."""
OWNER_SCRIPT = """
import sys, time
from pathlib import Path
from fedprompt.deploy.processes import Processes
group = Processes(Path(sys.argv[1]))
group.start("family", ["sh", "-c", sys.argv[2]])
while len(group.alive()) < 3:
    time.sleep(0.01)
print("started", flush=True)
time.sleep(600)
"""


def wait_until(reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that owns `tmp_path` and runs `FAMILY` in it."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER_SCRIPT, str(tmp_path), FAMILY],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    yield process
    process.kill()
    process.communicate()
    kill_group(setting(tmp_path))


def setting(folder: Path) -> str:
    return f"{MARK}={json.loads((folder / OWNER).read_text())['mark']}"


def guards(folder: Path) -> list[int]:
    """Ids of the guard processes of a folder's owner."""
    found = []
    for process in guard.PROC.iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and (process / "cmdline").read_bytes().endswith(
                f"\0{setting(folder)}\0".encode()
            ):
                found.append(int(process.name))
    return found


@needs_processes
def test_a_group_ends_with_an_owner_that_is_killed(
    owner: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert len(processes_with(setting(tmp_path))) == 3
    assert len(guards(tmp_path)) == 1
    assert f"process {owner.pid}" in in_use(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} .*process {owner.pid} "):
        Ownership(tmp_path)
    os.killpg(owner.pid, signal.SIGKILL)
    owner.wait()
    wait_until(lambda: not processes_with(setting(tmp_path)))
    wait_until(lambda: not guards(tmp_path))
    assert in_use(tmp_path) == ""


@needs_processes
def test_the_next_owner_ends_what_a_killed_guard_has_left(
    owner: subprocess.Popen[str], tmp_path: Path
) -> None:
    (guardian,) = guards(tmp_path)
    os.kill(guardian, signal.SIGKILL)
    owner.kill()
    owner.wait()
    earlier = setting(tmp_path)
    assert len(processes_with(earlier)) == 3
    Ownership(tmp_path).release()
    assert not processes_with(earlier)


@needs_processes
def test_a_group_that_is_stopped_leaves_neither_processes_nor_a_guard(tmp_path: Path) -> None:
    with Processes(tmp_path) as group:
        group.start("family", ["sh", "-c", FAMILY])
        wait_until(lambda: len(group.alive()) == 3)
        group.running["family"].terminate()  # the family's parent ends first
    assert not processes_with(setting(tmp_path))
    assert not guards(tmp_path)
    Processes(tmp_path).stop()


def test_without_proc_a_group_is_its_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "PROC", tmp_path / "none")
    with Processes(tmp_path) as group:
        process = group.start(
            "family", ["sh", "-c", f"sleep 600 & echo $! > {tmp_path}/child; wait"]
        )
        wait_until((tmp_path / "child").exists)
        assert group.alive() == [process.pid]
    assert process.returncode is not None
    assert group.alive() == []

    def ended() -> bool:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    wait_until(ended)


def test_a_second_command_on_a_folder_is_refused(tmp_path: Path) -> None:
    create_federation(tmp_path, ["127.0.0.1"], 1, free_port(), 30)
    node = read_node_folder(tmp_path / "node-0")
    first = Ownership(node.path)
    with pytest.raises(UserError, match=f"{node.path} is in use by process {os.getpid()} "):
        run_node(node, {}, None)
    first.release()


def test_a_local_run_in_progress_is_not_resumed(tmp_path: Path) -> None:
    run, nodes = tmp_path / "run", tmp_path / "run-nodes"
    run.mkdir()
    nodes.mkdir()
    (run / "config.yaml").write_text("seed: 1\n")
    (run / "deployment.json").write_text('{"run": "r"}')
    first = Ownership(nodes)
    with pytest.raises(UserError, match=f"{run} is in progress: .*process {os.getpid()} "):
        resume_local(run, QuietDisplay())
    first.release()
    with pytest.raises(UserError, match=r"local\.json"):
        resume_local(run, QuietDisplay())
