"""Sweeps: which runs a file means, that nothing is lost, and that nothing but time changes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from fedprompt.bench.cli import app as bench_app
from fedprompt.cli.main import app
from fedprompt.config.schema import to_yaml
from fedprompt.config.shipped import configs_dir
from fedprompt.data.sections import available
from fedprompt.errors import UserError
from fedprompt.experiment.compose import compose
from fedprompt.experiment.workspaces import ResourceCache, open_workspace
from fedprompt.reports.compare.names import PLAN
from fedprompt.reports.run_data import CONFIG, METRICS, PARTITION, PROMPTS, SUMMARY
from fedprompt.sweeps import worker
from fedprompt.sweeps.live import Board, LiveBoard, PlainBoard
from fedprompt.sweeps.plan import (
    PlannedRun,
    Resources,
    expand,
    load_sweep,
    settings_hash,
    sweep_path,
)
from fedprompt.sweeps.run import _fits, _room, check_inline, places_here, run_serial
from fedprompt.sweeps.state import progress, rounds_done, seconds_left

TINY = [
    "data.images_per_class=8", "data.domains=[savanna]", "partition.clients=3",
    "partition.alpha=1", "federation.rounds=1", "training.batch_size=8",
]  # fmt: skip
BASE: dict[str, Any] = {
    "experiment": "benchmark",
    "seeds": [1, 2],
    "common": TINY,
    "rows": {"PromptFL": ["method=promptfl"], "FedRSCLIP [x]": []},
    "grid": {"training.lr": [0.02, 0.1]},
}
SHIPPED = available("sweep")


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "table.yaml"
    content = {k: v for k, v in {**BASE, **changes}.items() if v is not None}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def plan(folder: Path, *overrides: str, **changes: Any) -> list[PlannedRun]:
    sweep = load_sweep(write(folder, **changes), quick="quick" in changes)
    return expand(sweep, folder / "out", overrides)


class TestPlan:
    """What a file means."""

    def test_rows_times_grid_times_seeds_in_order(self, tmp_path: Path) -> None:
        runs = plan(tmp_path, grid={"training.lr": [0.02, 0.1], "partition.clients": [2, 3]})
        assert len(runs) == 16
        assert [(r.row, dict(r.values), r.seed) for r in runs[:3]] == [
            ("PromptFL", {"training.lr": 0.02, "partition.clients": 2}, 1),
            ("PromptFL", {"training.lr": 0.02, "partition.clients": 2}, 2),
            ("PromptFL", {"training.lr": 0.02, "partition.clients": 3}, 1),
        ]
        config = runs[-1].config
        assert (config.method.name, config.training.lr, config.partition.clients) == (
            "fedrsclip", 0.1, 3,
        )  # fmt: skip
        assert config.seed == 2

    def test_a_config_is_that_of_the_single_run(self, tmp_path: Path) -> None:
        run = plan(tmp_path)[3]
        folder = f"output.dir='{run.folder}'"
        single = [*TINY, "method=promptfl", "training.lr=0.1", "seed=2", folder]
        assert run.config == compose("benchmark", single)

    def test_names_are_readable_and_hold_every_setting(self, tmp_path: Path) -> None:
        runs = plan(tmp_path)
        assert [r.name.rpartition("-")[0] for r in runs[-2:]] == [
            "fedrsclip-x-lr0.1-seed1", "fedrsclip-x-lr0.1-seed2",
        ]  # fmt: skip
        # A setting that no name shows: still another folder.
        other = plan(tmp_path, "evaluation.every=3")
        assert len({r.folder for r in (*runs, *other)}) == 16
        assert [r.name for r in plan(tmp_path)] == [r.name for r in runs]

    def test_places_do_not_enter_the_hash(self, tmp_path: Path) -> None:
        config = plan(tmp_path)[0].config
        moved = replace(config.output, dir="elsewhere", root="other", cache="cache")
        assert settings_hash(replace(config, output=moved)) == settings_hash(config)
        assert settings_hash(replace(config, seed=7)) != settings_hash(config)

    def test_threads_are_fixed(self, tmp_path: Path) -> None:
        free = "simulation.threads=0"
        assert plan(tmp_path, free, resources={"cpus": 2.5})[0].config.simulation.threads == 2
        assert plan(tmp_path, free)[0].config.simulation.threads == 1
        assert plan(tmp_path, "simulation.threads=3")[0].config.simulation.threads == 3

    def test_grid_takes_names_lists_and_null(self, tmp_path: Path) -> None:
        grid = {"method": ["promptfl", "kgcoop"], "partition.shots": [None, 4]}
        runs = plan(tmp_path, rows=None, grid=grid, seeds=[1])
        assert [(r.config.method.name, r.config.partition.shots) for r in runs] == [
            ("promptfl", None), ("promptfl", 4), ("kgcoop", None), ("kgcoop", 4),
        ]  # fmt: skip
        assert runs[0].name.startswith("promptfl-methodpromptfl-shotsnull-seed1-")

    def test_quick_adds_to_common_and_replaces_the_rest(self, tmp_path: Path) -> None:
        quick = {"seeds": [5], "common": ["federation.rounds=0"], "rows": ["PromptFL"], "grid": {}}
        (run,) = expand(load_sweep(write(tmp_path, quick=quick), quick=True), tmp_path)
        assert (run.row, run.seed, run.config.federation.rounds) == ("PromptFL", 5, 0)
        assert run.config.partition.clients == 3
        assert load_sweep(tmp_path / "table.yaml", quick=True).name == "table-quick"

    def test_an_experiment_may_lie_beside_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text("extends: benchmark\nseed: 1\n")
        runs = plan(tmp_path, experiment="mine.yaml")
        assert runs[0].config.experiment == "mine"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"row": {}}, "unknown key 'row'. Did you mean 'rows'"),
            ({"experiment": None}, "must name its 'experiment'"),
            ({"seeds": [1, 1]}, "different whole numbers"),
            ({"seeds": "1"}, "different whole numbers"),
            ({"common": "a=1"}, "must be a list of overrides"),
            ({"rows": ["method=promptfl"]}, "'rows' must hold"),
            ({"grid": {"training.lr": 0.1}}, "'grid' must hold"),
            ({"grid": {"seed": [1, 2]}}, "cannot hold seed"),
            ({"resources": {"cpus": 0}}, "resources.cpus is 0"),
            ({"resources": {"gpu": 1}}, "Did you mean 'gpus'"),
            ({"rows": {"a": ["methd=promptfl"]}}, "a, lr 0.02: config: unknown key 'methd'"),
            ({"rows": {"a": [], "b": []}}, "'b, lr 0.02' and 'a, lr 0.02' are the same runs"),
            ({"common": ["output.dir=x"]}, "output.dir is set"),
            ({"common": ["seed=4"]}, "seed is an override"),
            ({"quick": {"rows": ["none"]}}, "no row 'none'"),
        ],
    )
    def test_mistakes_are_one_line(
        self, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(UserError, match=message.replace("[", r"\[")) as caught:
            plan(tmp_path, **changes)
        assert "\n" not in str(caught.value)

    def test_missing_files_and_variants(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="Did you mean 'few_shot'"):
            sweep_path("few_shots")
        with pytest.raises(UserError, match="cannot read"):
            load_sweep(tmp_path / "none.yaml")
        with pytest.raises(UserError, match="has no 'quick' variant"):
            load_sweep(write(tmp_path), quick=True)

    @pytest.mark.parametrize("name", SHIPPED)
    def test_shipped_files_say_what_they_are_and_have_a_quick_variant(self, name: str) -> None:
        path = configs_dir() / "sweep" / f"{name}.yaml"
        comment = [x for x in path.read_text().splitlines() if x.startswith("#")]
        assert any(f"fedprompt sweep {name}" in line for line in comment)
        (told,) = (line for line in comment if line.startswith("# Time:"))
        real = path.stem.startswith("fed_") or path.stem == "fedrsclip_main"  # needs other data
        assert re.search(r"\bmin", told) or real
        assert ("not measured" in told) == real
        runs = expand(load_sweep(path, quick=True), Path("out"))
        assert all(r.config.backbone.model == "tiny" for r in runs)
        assert all(r.config.federation.rounds == 2 for r in runs)


class TestPlaces:
    """How many runs at once."""

    def test_as_many_as_there_is_room_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fedprompt.sweeps.run.available_cpus", lambda: 8)
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


def fake_run(run: PlannedRun, rounds: int, seconds: float | None) -> None:
    """The files that say how far a run is."""
    run.folder.mkdir(parents=True)
    (run.folder / CONFIG).write_text(to_yaml(run.config))
    lines = [json.dumps({"round": r, "train_s": 1, "evaluate_s": 1}) for r in range(rounds)]
    (run.folder / "timings.jsonl").write_text("\n".join([*lines, '{"round": 9']))
    if seconds is not None:
        parts = {"global": {"accuracy": 0.612}, "personal": {"mean": 0.789}}
        (run.folder / SUMMARY).write_text(json.dumps({"wall_s": seconds, **parts}))


class TestState:
    """What folders say."""

    def test_estimate_is_from_finished_runs_alike(self, tmp_path: Path) -> None:
        runs = plan(tmp_path, "federation.rounds=9")
        assert seconds_left(runs, 2) is None
        fake_run(runs[0], 10, 100.0)  # the first row and value: 100 s for its other seed
        fake_run(runs[2], 5, None)  # half done: half of the usual
        assert rounds_done(runs[2].folder) == 5
        assert progress(runs[2]).begun
        assert not progress(runs[2]).done
        # 100 + 50 + five others of 100, on one place, then on two.
        assert seconds_left(runs, 1) == pytest.approx(650)
        assert seconds_left(runs, 2) == pytest.approx(350)
        fake_run(runs[4], 10, 20.0)  # another row: 20 s for its other seed, 60 s elsewhere
        assert seconds_left(runs, 1) == pytest.approx(100 + 30 + 60 + 20 + 60 + 60)

    def test_a_folder_without_rounds_is_at_the_start(self, tmp_path: Path) -> None:
        run = plan(tmp_path)[0]
        assert progress(run) == progress(run).__class__(False, False, 0)
        assert rounds_done(tmp_path) == 0


class TestBoard:
    """What is shown."""

    def board(self, cls: type[Board], runs: list[PlannedRun], height: int = 40) -> Board:
        console = Console(file=io.StringIO(), width=100, height=height, force_terminal=False)
        return cls(runs, 2, console)

    def said(self, board: Board) -> str:
        assert isinstance(board.console.file, io.StringIO)
        return board.console.file.getvalue()

    def test_plain_lines(self, tmp_path: Path) -> None:
        runs = plan(tmp_path)
        board = self.board(PlainBoard, runs)
        fake_run(runs[0], 2, 3.0)
        board.skip(runs[0])
        board.start(runs[1])
        fake_run(runs[1], 2, 3.0)
        board.finish(runs[1], "")
        board.start(runs[2])
        board.finish(runs[2], "no room on [the] disk")
        lines = self.said(board).splitlines()
        assert lines[0] == f"start  {runs[1].name}"
        assert lines[1].startswith(
            f"done   {runs[1].name}  global 61.2 %  personal 78.9 %  took 0:"
        )
        assert "(8 runs: 2 done, 6 waiting, about 0:09 left)" in lines[1]
        assert lines[3] == f"FAILED {runs[2].name}: no room on [the] disk"
        assert board.failures == {runs[2].name: "no room on [the] disk"}
        assert board.counts().startswith("8 runs: 2 done, 5 waiting, 1 failed")

    def test_live_table_shows_what_runs_where_room_is_short(self, tmp_path: Path) -> None:
        runs = plan(tmp_path)
        board = self.board(LiveBoard, runs, height=10)
        assert isinstance(board, LiveBoard)
        board.start(runs[6])
        board.finish(runs[5], "broken")
        board.console.print(board.table())
        shown = self.said(board)
        assert "round 0/1" in shown
        assert "failed: broken" in shown
        assert sum("-seed" in line for line in shown.splitlines()) == 4
        assert "8 runs: 1 running, 6 waiting, 1 failed" in shown

    @pytest.mark.parametrize("width", [80, 50])
    def test_live_table_cuts_no_number_and_keeps_the_end_of_a_name(
        self, tmp_path: Path, width: int
    ) -> None:
        rows = {f"{word} with a name that is far too long for a column": [] for word in "ab"}
        rows["b with a name that is far too long for a column"] = ["method=promptfl"]
        runs = plan(tmp_path, rows=rows)
        console = Console(file=io.StringIO(), width=width, height=40, force_terminal=False)
        board = LiveBoard(runs, 2, console)
        fake_run(runs[0], 2, 3.0)
        board.skip(runs[0])
        board.start(runs[1])
        board.finish(runs[2], "too few images " * 20)
        console.print(board.table())
        lines = self.said(board).splitlines()
        assert max(map(len, lines)) <= width
        (done,) = (line for line in lines if "61.2 %" in line)
        assert "78.9 %" in done
        (running,) = (line for line in lines if "round 0/1, 0:0" in line)
        assert "-seed2" in running
        assert any("failed: too" in line for line in lines)
        assert sum("seed1" in line for line in lines) == 4


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
    assert "in broken" in (run.folder / worker.ERROR).read_text()
    assert worker.complete(run.config, ResourceCache(), 1).failure == ""
    assert not (run.folder / worker.ERROR).exists()


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


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [n for n in SHIPPED if n != "all_methods"])
def test_quick_variants_run(name: str, tmp_path: Path) -> None:
    runs = expand(load_sweep(sweep_path(name), quick=True), tmp_path)
    board = Board(runs, 1, Console(quiet=True))
    run_serial(runs, board)
    assert not board.failures


def test_bench_wants_whole_tables() -> None:
    done = CliRunner().invoke(bench_app, ["sweep", "--runs", "9"])
    assert isinstance(done.exception, UserError)
    assert "multiple of 8" in str(done.exception)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bench_compares_a_sweep_with_single_commands(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    arguments = ["--runs", "8", "--rounds", "1", "--images-per-class", "8", "--json", str(rows)]
    done = CliRunner().invoke(bench_app, ["sweep", *arguments])
    assert done.exception is None, done.output
    (row,) = json.loads(rows.read_text())
    assert row["different"] == 0
    assert row["ratio"] == row["reference_s"] / row["ours_s"]
