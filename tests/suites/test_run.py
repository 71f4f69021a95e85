"""A run of a suite: searched and default settings, resumed, extended, and refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedprompt.cli.main import main
from fedprompt.errors import UserError
from fedprompt.suites import run as module
from fedprompt.suites.fingerprints import Fingerprints
from fedprompt.suites.load import load_suite, suite_path
from fedprompt.suites.result_file import ResultFile, read
from fedprompt.suites.run import Execution, open_data, run_suite
from fedprompt.suites.spec import Suite
from tests.support.suites import load, scenario

HERE = Execution(serial=True, quiet=True)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return load(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="module")
def whole(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert not run_suite(suite, suite.rows, folder, execution=HERE).failures
    return folder


def results(folder: Path) -> dict[str, ResultFile]:
    return {path.stem: read(path) for path in sorted((folder / "results").glob("*.json"))}


def numbers(folder: Path) -> dict[str, Any]:
    """The result files without what depends on the moment: times and memory."""

    def bare(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        some = ("seconds", "peak_memory_bytes", "checksum")
        return {key: bare(value) for key, value in node.items() if key not in some}

    return {p.stem: bare(json.loads(p.read_text())) for p in (folder / "results").iterdir()}


def test_a_result_file_has_both_columns_of_every_scenario(suite: Suite, whole: Path) -> None:
    found = results(whole)
    assert list(found) == ["promptfl", "zero-shot-clip"]
    result = found["promptfl"]
    assert result.suite_hash == suite.hash
    assert result.method == "promptfl"
    assert "2 trials" in result.search
    for part in result.scenarios.values():
        assert part.tuned
        assert part.default
        assert (set(part.tuned.settings), part.tuned.trials) == ({"training.lr"}, 2)
        assert (part.default.settings, part.default.trials) == ({}, 0)
        seed = part.default.seeds[1]
        assert seed.value == seed.personal
        assert seed.client_steps > 0
    # One search chose the settings of both scenarios.
    chosen = [part.tuned.settings for part in result.scenarios.values() if part.tuned]
    assert chosen[0] == chosen[1]
    assert not found["zero-shot-clip"].search


def test_trials_have_images_of_their_own(whole: Path) -> None:
    trials = list((whole / "skew" / "search" / "promptfl" / "trials").glob("*/config.yaml"))
    runs = list((whole / "skew" / "tuned").glob("*/config.yaml"))
    assert len(trials) == len(runs) == 2
    first = [yaml.safe_load(p.read_text())["data"]["first_image"] for p in (*trials, *runs)]
    assert first == [8, 8, 0, 0]


def test_a_tuned_run_names_its_search(whole: Path) -> None:
    (run,) = (whole / "alike" / "tuned").glob("promptfl-*")
    by = yaml.safe_load((run / "config.yaml").read_text())["evaluation"]["chosen_by"]
    assert by.startswith("2 trials")
    assert by.endswith("scenario skew")


def test_an_interrupted_suite_ends_with_the_same_results(
    suite: Suite, whole: Path, tmp_path: Path
) -> None:
    again = tmp_path / "out"
    shutil.copytree(whole, again)
    shutil.rmtree(next((again / "skew" / "search" / "promptfl" / "trials").iterdir()))
    shutil.rmtree(next((again / "alike" / "default").glob("promptfl-*")))
    shutil.rmtree(again / "results")
    assert not run_suite(suite, suite.rows, again, execution=HERE).failures
    assert numbers(again) == numbers(whole)


def test_a_row_is_added_and_the_others_are_kept(suite: Suite, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    rows = {"kgcoop": ("method=kgcoop",)}
    done = run_suite(suite, rows, folder, settings=["default"], execution=HERE)
    assert list(done.results) == ["kgcoop"]
    assert done.results["kgcoop"].scenarios["skew"].tuned is None
    assert sorted(results(folder)) == ["kgcoop", "promptfl", "zero-shot-clip"]
    plan = json.loads((folder / "skew" / "default" / "sweep.json").read_text())
    assert sorted(plan["rows"]) == ["PromptFL", "Zero-shot CLIP", "kgcoop"]


def test_a_failed_run_is_told_and_left_out(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = module.run_planned

    def run_planned(table: Any, runs: Any, *args: Any, **kwargs: Any) -> dict[str, str]:
        kept = [run for run in runs if "alike" not in run.name]
        failed = {run.name: "lightning" for run in runs if run not in kept}
        return {**whole(table, kept, *args, **kwargs), **failed}

    monkeypatch.setattr(module, "run_planned", run_planned)
    rows = {"Zero-shot CLIP": suite.rows["Zero-shot CLIP"]}
    done = run_suite(suite, rows, tmp_path / "out", settings=["default"], execution=HERE)
    assert list(done.failures.values()) == ["lightning"]
    assert list(done.results["Zero-shot CLIP"].scenarios) == ["skew"]


def fingerprints(suite: Suite) -> dict[str, Fingerprints]:
    return open_data(suite, {name: [] for name in suite.scenarios})


def test_other_data_or_partitions_are_refused_before_any_work(suite: Suite, tmp_path: Path) -> None:
    found = fingerprints(suite)["skew"]
    pins = {"data": found.data, "partitions": dict(found.partitions)}
    fingerprints(load(tmp_path, scenarios=scenario("skew", **pins)))
    for key, wrong in (("data", "0" * 64), ("partitions", {1: "0" * 64})):
        other = load(tmp_path, scenarios=scenario("skew", **{**pins, key: wrong}))
        with pytest.raises(UserError, match=r"skew.*fingerprint"):
            run_suite(other, other.rows, tmp_path / "out", execution=HERE)
    assert not (tmp_path / "out").exists()


def test_missing_data_are_named_before_any_work(tmp_path: Path) -> None:
    changes = ["data=ucmerced", "data.root=/nowhere"]
    suite = load(tmp_path, common=None, search=None, scenarios=scenario("skew", overrides=changes))
    with pytest.raises(UserError, match=r"skew.*ucmerced.*/nowhere"):
        run_suite(suite, suite.rows, tmp_path / "out", execution=HERE)
    with pytest.raises(UserError, match=rf"{tmp_path}/ucmerced"):
        run_suite(suite, suite.rows, tmp_path / "out", data=tmp_path, execution=HERE)
    assert not (tmp_path / "out").exists()


def test_a_space_that_no_row_has_is_refused(tmp_path: Path) -> None:
    suite = load(tmp_path, space={"method.tmeperature": [0.1, 1.0]})
    with pytest.raises(UserError, match="tmeperature"):
        run_suite(suite, suite.rows, tmp_path / "out", execution=HERE)


def test_a_folder_serves_one_suite(suite: Suite, whole: Path, tmp_path: Path) -> None:
    other = load(tmp_path, seeds=[2])
    with pytest.raises(UserError, match="another content"):
        run_suite(other, other.rows, whole, settings=["default"], execution=HERE)
    other = load(tmp_path, name="small-v2")
    with pytest.raises(UserError, match="small-v1"):
        run_suite(other, other.rows, whole, settings=["default"], execution=HERE)
    with pytest.raises(UserError, match="PromptFL"):
        run_suite(suite, {"PromptFL": ("method=kgcoop",)}, whole, execution=HERE)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="mine"):
        run_suite(suite, suite.rows, tmp_path / "mine", execution=HERE)


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (["list"], 0, "scenes-v1"),
        (["show", "scenes-v1"], 0, "base-to-new"),
        (["run", "scenes-v2"], 2, "scenes-v1"),
        (["run", "scenes-v1", "--methods", "promtfl"], 2, "promptfl"),
        (["run", "scenes-v1", "--settings", "best"], 2, "tuned"),
    ],
)
def test_the_command_line(
    arguments: list[str],
    status: int,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["fedprompt", "suite", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code or 0) == status
    captured = capsys.readouterr()
    assert named in captured.out + captured.err


def test_drawing_and_partitions_are_those_that_the_embedded_suite_pins() -> None:
    """A failure means that results change: undo the change, or make a new version of the suite."""
    suite = load_suite(suite_path("scenes-v1"))
    found = fingerprints(suite)
    for part in suite.scenarios.values():
        assert found[part.name] == Fingerprints(part.data or "", part.partitions or {})


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_suite_goes_on_with_the_same_command(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fedprompt", "suite", "run", "scenes-v1", "--quick"]
    command += ["--serial", "--out", str(out)]
    done: list[Path] = []
    with (tmp_path / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while process.poll() is None and not done and time.monotonic() < deadline:
            done = list(out.glob("*/search/*/trials/*/summary.json"))
            time.sleep(0.05)
        process.kill()
        process.wait()
    assert done
    times = {path: path.stat().st_mtime_ns for path in done}
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in done} == times
    assert sorted(results(out)) == ["fedrsclip", "promptfl"]
    assert f"fedprompt leaderboard {out}" in again.stdout
