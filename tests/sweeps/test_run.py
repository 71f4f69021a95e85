"""Sweeps run every planned run, survive failures, and give the bits of single runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedprompt.cli.main import app
from fedprompt.config.schema import to_yaml
from fedprompt.errors import UserError
from fedprompt.experiment.workspaces import ResourceCache, open_workspace
from fedprompt.reports.compare.names import PLAN
from fedprompt.reports.run_data import CONFIG, ERROR, METRICS, PARTITION, PROMPTS
from fedprompt.sweeps import worker
from fedprompt.sweeps.live import Board
from fedprompt.sweeps.plan import (
    PlannedRun,
    Resources,
    expand,
    load_sweep,
    sweep_path,
)
from fedprompt.sweeps.run import _fits, _room, check_inline, places_here, run_serial
from fedprompt.sweeps.state import rounds_done
from tests.support.sweeps import SHIPPED, TINY, fake_run, plan, write


class TestPlaces:
    """How many runs at once."""

    def test_as_many_as_there_is_room_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fedprompt.sweeps.run.cpu_count", lambda: 8)
        monkeypatch.setattr("fedprompt.sweeps.run.free_memory", lambda device: 10e9)
        assert places_here(Resources(cpus=3), 24) == 2
        assert places_here(Resources(cpus=0.5), 24) == 16
        assert places_here(Resources(), 3) == 3
        assert places_here(Resources(), 24, most=5) == 5
        assert places_here(Resources(memory_gb=3), 24) == 3
        assert places_here(Resources(cpus=64), 24) == 1

    def test_shares_of_a_gpu_do_not_reach_over_two(self) -> None:
        assert [_fits(2, share) for share in (0.5, 0.4, 0.1, 1, 2, 3)] == [4, 4, 20, 2, 1, 0]

    def test_a_cluster_is_counted_by_node(self) -> None:
        nodes = [
            {"Alive": True, "Resources": {"CPU": 3, "GPU": 1, "memory": 9e9}},
            {"Alive": True, "Resources": {"CPU": 1}},
            {"Alive": False, "Resources": {"CPU": 64}},
        ]
        assert _room(nodes, Resources(cpus=2)) == 1
        assert _room(nodes, Resources()) == 4
        assert _room(nodes, Resources(gpus=0.5)) == 2
        assert _room(nodes, Resources(memory_gb=4)) == 2

    def test_ray_within_ray_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"simulation\.kind=inline"):
            check_inline(plan(tmp_path, "simulation.kind=ray"))


RESULTS = (METRICS, PROMPTS, PARTITION)


def assert_same(ours: Path, theirs: Path) -> None:
    for name in RESULTS:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), f"{ours}: {name}"


def fresh_run(run: PlannedRun, target: Path) -> None:
    """The run by `fedprompt run` in a new process."""
    file = target.with_suffix(".yaml")
    config = replace(run.config, output=replace(run.config.output, dir=str(target)))
    file.write_text(to_yaml(config))
    command = [sys.executable, "-m", "fedprompt", "run", str(file), "--quiet"]
    subprocess.run(command, check=True, capture_output=True)


def test_serial_sweep_of_one_process_has_the_bits_of_fresh_ones(tmp_path: Path) -> None:
    runs = plan(tmp_path, grid=None, common=[*TINY, "simulation.threads=0"])
    board = Board(runs, 1, Console(quiet=True))
    run_serial(runs, board)
    assert not board.failures
    # The last one: what earlier runs have left in this process would show in it.
    fresh_run(runs[-1], tmp_path / "fresh")
    assert_same(runs[-1].folder, tmp_path / "fresh")


def test_backbone_and_data_are_opened_once(tmp_path: Path) -> None:
    runs = plan(tmp_path)
    resources = ResourceCache()
    spaces = [open_workspace(r.config, progress=False, resources=resources) for r in runs[:3]]
    assert spaces[0].clip is spaces[1].clip is spaces[2].clip
    assert spaces[0].dataset is spaces[2].dataset
    assert spaces[0].dataset is not spaces[1].dataset, "another seed"
    other = replace(runs[0].config.backbone, image_batch=3)
    assert resources.clip(other, tmp_path) is not spaces[0].clip


def test_one_failed_run_stops_no_other_and_the_command_says_why(tmp_path: Path) -> None:
    rows = {"too few": ["partition.min_images=5000"], "good": []}
    file = write(tmp_path, rows=rows, grid=None, seeds=[1])
    arguments = ["sweep", str(file), "--serial", "--out", str(tmp_path / "out")]
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert dry.exit_code == 0
    assert "2 runs: 0 done" in dry.stdout
    assert "2 new" in dry.stdout
    assert "unknown" in dry.stdout
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "1 of 2 runs are complete" in done.stdout
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED too-few")]
    assert len(failed) == 2, "when it fails, and at the end"
    assert "lower partition.clients or partition.min_images" in failed[0]
    summary = next((tmp_path / "out").glob("good-*/summary.json"))
    written = summary.stat().st_mtime_ns
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "start  good" not in again.stdout
    assert summary.stat().st_mtime_ns == written
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert "1 done" in dry.stdout
    assert "from 1 finished runs" in dry.stdout


def test_an_unexpected_error_is_one_line_and_its_traceback_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = plan(tmp_path)[0]

    def broken(*arguments: object, **options: object) -> None:
        raise ValueError("first line\nsecond line")

    with monkeypatch.context() as patched:
        patched.setattr("fedprompt.experiment.run.open_workspace", broken)
        outcome = worker.complete(run.config, ResourceCache(), 1)
    assert outcome.failure.startswith("ValueError: first line second line (traceback: ")
    assert "in broken" in (run.folder / ERROR).read_text()
    assert worker.complete(run.config, ResourceCache(), 1).failure == ""
    assert not (run.folder / ERROR).exists()


def test_a_folder_of_another_config_is_not_touched(tmp_path: Path) -> None:
    first, second = plan(tmp_path)[:2]
    fake_run(first, 0, None)
    (first.folder / CONFIG).write_text(to_yaml(second.config))
    before = sorted(p.name for p in first.folder.iterdir())
    outcome = worker.complete(first.config, ResourceCache(), 1)
    assert "holds a run with another config" in outcome.failure
    assert {*before, ".lock"} == {p.name for p in first.folder.iterdir()} | {".lock"}


def _state(folder: Path) -> dict[str, int]:
    return {p.parent.name: p.stat().st_mtime_ns for p in folder.glob("*/summary.json")}


@contextmanager
def started(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "fedprompt", *arguments]
    with log.open("ab") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ray_sweep_survives_kill_9_and_has_the_bits_of_single_runs(tmp_path: Path) -> None:
    # Long enough that a run does not end while Ray's workers notice that the sweep is gone.
    rounds = 30
    common = [*TINY, f"federation.rounds={rounds}"]
    file = write(tmp_path, common=common)
    out, log = tmp_path / "out", tmp_path / "log.txt"
    arguments = ["sweep", str(file), "--out", str(out), "--jobs", "2"]
    deadline = time.monotonic() + 300
    runs = expand(load_sweep(file), out)

    def in_the_middle() -> bool:
        # Three are done and one that is not has trained for some rounds.
        begun = [r for r in runs if 3 < rounds_done(r.folder) < rounds / 3]
        return len(_state(out)) >= 3 and bool(begun)

    with started(arguments, log) as process:
        while not in_the_middle():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    before = _state(out)
    assert len(before) < len(runs)
    with started(arguments, log) as again:
        assert again.wait(timeout=300) == 0, log.read_text()
    after = _state(out)
    assert set(after) == {r.name for r in runs}
    kept = {name for name, written in before.items() if after[name] == written}
    assert kept == set(before), "what was finished has been done again"
    assert "from round" in log.read_text(), "nothing was resumed"
    for run in runs:
        fresh = tmp_path / "fresh" / run.name
        fresh.parent.mkdir(exist_ok=True)
        config = replace(run.config, output=replace(run.config.output, dir=str(fresh)))
        # In this process; that a process of its own has the same bits is tested above.
        assert worker.complete(config, ResourceCache(), 1).failure == ""
        assert_same(run.folder, fresh)
    assert json.loads((out / PLAN).read_text())["keys"] == ["training.lr"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_worker_is_replaced_and_its_run_goes_on(tmp_path: Path) -> None:
    file = write(tmp_path, common=[*TINY, "federation.rounds=20"], grid=None, seeds=[1])
    out, log = tmp_path / "out", tmp_path / "log.txt"
    runs = expand(load_sweep(file), out)
    deadline = time.monotonic() + 400
    killed = 0
    with started(["sweep", str(file), "--out", str(out), "--jobs", "2"], log) as process:
        while process.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            busy = [r for r in runs if 3 < rounds_done(r.folder) < 18]
            if busy and not killed:
                killed = _holder(busy[0].folder / ".lock")
                if killed:
                    os.kill(killed, signal.SIGKILL)
            time.sleep(0.01)
    text = log.read_text()
    assert killed
    assert process.returncode == 0, text
    assert "its process died; it goes on from its last checkpoint" in text
    assert "2 of 2 runs are complete" in text


def _holder(path: Path) -> int:
    """Process id of another process that has this file open, 0 without one."""
    for entry in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(fd) == str(path) for fd in entry.iterdir()):
                return int(entry.parent.name)
        except OSError:
            continue
    return 0


def once_each(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Runs in which every row and every grid value of a sweep occurs, with the values in turn."""
    of_row: dict[str, list[PlannedRun]] = {}
    for run in runs:
        of_row.setdefault(run.row, []).append(run)
    rows = list(of_row.values())
    return [rows[i % len(rows)][i % len(rows[0])] for i in range(max(len(rows), len(rows[0])))]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [n for n in SHIPPED if n != "all_methods"])
def test_quick_variants_run(name: str, tmp_path: Path) -> None:
    planned = expand(load_sweep(sweep_path(name), quick=True), tmp_path)
    runs = once_each(planned)
    assert {r.row for r in runs} == {r.row for r in planned}
    for key in planned[0].values:
        assert {r.values[key] for r in runs} == {r.values[key] for r in planned}
    board = Board(runs, 1, Console(quiet=True))
    run_serial(runs, board)
    assert not board.failures
