"""Trackers hold what `metrics.jsonl` holds, once, also after a stop; none can end a run.

TensorBoard and MLflow are the real ones on local files. W&B is a fake that records its calls; where
W&B is installed, a real offline run is made too.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedprompt.config.schema import Config
from fedprompt.errors import UserError
from fedprompt.experiment import trackers as loggers
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import resume, run
from fedprompt.experiment.trackers.base import Point, numbers, parameters
from fedprompt.experiment.trackers.state import STATE, read_state
from tests.support.builders import small_config

ROUNDS = 3


class Stop(Exception):
    """What ends a run in the middle."""


class StoppingDisplay(QuietDisplay):
    """Ends the run after round 2, which is logged and not in the checkpoint of round 0."""

    def round(self, record: Mapping[str, Any], eta_s: float | None) -> None:
        if record["round"] == 2:
            raise Stop


def config_for(folder: Path, *names: str) -> Config:
    config = small_config(
        data={"images_per_class": 8, "domains": ["savanna"]},
        federation={"rounds": ROUNDS},
        partition={"clients": 3, "alpha": 1.0},
        evaluation={"local_only": True},
        output={"checkpoint_every": 10, "report": False, "loggers": list(names)},
    )
    return replace(config, output=replace(config.output, dir=str(folder)))


def stopped_and_resumed(folder: Path, *names: str) -> Path:
    with pytest.raises(Stop):
        run(config_for(folder, *names), StoppingDisplay())
    return resume(folder, QuietDisplay())


def expected_points(folder: Path) -> dict[str, dict[int, float]]:
    """Every number of `metrics.jsonl`, by metric and round; written independently of loggers."""
    points: dict[str, dict[int, float]] = {}

    def walk(value: Any, path: tuple[str, ...], server_round: int) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, (*path, key), server_round)
        elif isinstance(value, (int, float)) and path[-1] not in ("round", "kind"):
            points.setdefault("/".join(path), {})[server_round] = value

    for text in (folder / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        walk(line, ("local_only",) if line["kind"] == "local_only" else (), line["round"])
    return points


def without_final(points: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    return {name: by_round for name, by_round in points.items() if not name.startswith("final/")}


def single(pairs: list[tuple[int, float]]) -> dict[int, float]:
    """Steps and values as a dict; a step that is there twice fails."""
    assert len({step for step, _ in pairs}) == len(pairs), pairs
    return dict(pairs)


def assert_close(found: dict[str, dict[int, float]], expected: dict[str, dict[int, float]]) -> None:
    assert {n: sorted(v) for n, v in found.items()} == {n: sorted(v) for n, v in expected.items()}
    for name, by_round in expected.items():
        for server_round, value in by_round.items():
            assert found[name][server_round] == pytest.approx(value, rel=1e-6), name


def test_tensorboard_holds_every_point_once_after_a_stop(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = stopped_and_resumed(tmp_path / "run", "tensorboard")
    log = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    log.Reload()
    found = {
        tag: single([(e.step, e.value) for e in log.Scalars(tag)]) for tag in log.Tags()["scalars"]
    }
    assert_close(without_final(found), expected_points(folder))
    assert {"global/accuracy", "personal/mean", "local_only/personal/mean", "lr"} <= set(found)
    summary = json.loads((folder / "summary.json").read_text())
    assert found["final/personal/worst"] == {
        ROUNDS: pytest.approx(summary["personal"]["worst"], rel=1e-6)
    }
    assert any("config" in tag for tag in log.Tags()["tensors"])
    assert "_hparams_/session_start_info" in log.summary_metadata
    assert len(list((folder / "tensorboard").iterdir())) == 2  # the two starts


def test_mlflow_holds_every_point_once_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "run"
    with pytest.raises(Stop):
        run(config_for(folder, "mlflow"), StoppingDisplay())
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(config_for(folder).experiment)
    (stopped,) = client.search_runs([experiment.experiment_id])
    assert stopped.info.status == "KILLED"
    resume(folder, QuietDisplay())
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == stopped.info.run_id
    assert found.info.run_name == "run"
    assert found.info.status == "FINISHED"
    points = {
        name: single(
            [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, name)]
        )
        for name in found.data.metrics
    }
    assert_close(without_final(points), expected_points(folder))
    summary = json.loads((folder / "summary.json").read_text())
    assert points["final/global/accuracy"] == {ROUNDS: summary["global"]["accuracy"]}
    assert found.data.params["training.lr"] == str(config_for(folder).training.lr)
    assert found.data.params["method.name"] == "fedrsclip"
    assert set(found.data.params) == set(parameters(config_for(folder)))
    assert not (tmp_path / "mlruns").exists()


def test_mlflow_makes_its_tables_without_a_word(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; from fedprompt.experiment.trackers.mlflow import _client;"
        "_client(Path('runs/run')).create_experiment('quickstart')"
    )
    (tmp_path / "runs").mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    done = subprocess.run(  # a fresh process: MLflow sets up its log when it is imported
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (tmp_path / "runs" / "mlflow.db").is_file()
    assert done.stdout + done.stderr == ""


def test_mlflow_begins_anew_where_its_run_was_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedprompt.experiment.trackers.mlflow import MLflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "run"
    folder.mkdir()
    config = config_for(folder, "mlflow")
    (folder / STATE).write_text(json.dumps({"mlflow": {"run": "0" * 32}}))
    logger = MLflow(folder, config)
    logger.add(Point(1, 1, {"odd name: a|b": 2.0}))
    logger.finish({"x": 1.0})
    logger.close()
    kept = json.loads((folder / STATE).read_text())["mlflow"]["run"]
    assert kept != "0" * 32
    again = MLflow(folder, config)
    assert again._seen == {"odd name_ a_b": {1}, "final/x": {ROUNDS}}
    again.close()


class FakeWandB(SimpleNamespace):
    """The calls of W&B that the logger makes, recorded."""

    def __init__(self) -> None:
        super().__init__(runs=[])

    @staticmethod
    def Settings(**settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **arguments: Any) -> Any:
        rows: list[tuple[int, dict[str, Any]]] = []
        state = SimpleNamespace(arguments=arguments, rows=rows, summary={}, exit=None, axes=[])
        state.log = lambda row, step, commit: rows.append((step, row))
        state.define_metric = lambda name, step_metric=None: state.axes.append((name, step_metric))
        state.finish = lambda exit_code: setattr(state, "exit", exit_code)
        self.runs.append(state)
        return state


def test_wandb_gets_every_row_once_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(loggers, "is_installed", lambda name: True)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    folder = stopped_and_resumed(tmp_path / "run", "wandb")
    first, second = fake.runs
    assert first.exit == 1
    assert second.exit == 0
    for made in (first, second):
        assert made.arguments["id"] == first.arguments["id"]
        assert made.arguments["resume"] == "allow"
        assert made.arguments["project"] == "fedprompt"
        assert made.arguments["config"]["method"]["name"] == "fedrsclip"
        assert ("*", "round") in made.axes
    rows = first.rows + second.rows
    assert [step for step, _ in rows] == list(range(2 * (ROUNDS + 1)))
    found: dict[str, dict[int, float]] = {}
    for _, row in rows:
        for name, value in row.items():
            if name != "round":
                found.setdefault(name, {})[row["round"]] = value
    assert found == expected_points(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert second.summary["final/personal/mean"] == summary["personal"]["mean"]


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """W&B's files are LevelDB logs after 7 bytes: blocks of 32 KiB of (crc, size, type, bytes)."""
    at, parts = 7, b""
    while at < len(content):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        size, kind = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_itself_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb.sdk", reason="W&B is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = stopped_and_resumed(tmp_path / "run", "wandb")
    found: dict[str, dict[int, float]] = {}
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for data in leveldb_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            items = record.history.item
            row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items}
            for name in set(row) - {"round"}:
                if not name.startswith("_"):
                    assert row["round"] not in found.setdefault(name, {})
                    found[name][row["round"]] = row[name]
    assert_close(found, expected_points(folder))


def test_a_missing_extra_is_one_line_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "is_installed", lambda name: name != "mlflow")
    with pytest.raises(UserError, match=r"mlflow not installed; pip install 'fedprompt\[mlflow\]'"):
        run(config_for(tmp_path / "run", "tensorboard", "mlflow"), QuietDisplay())
    assert not (tmp_path / "run").exists()


def test_a_folder_of_that_name_is_no_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_tracker").mkdir()  # as W&B leaves one in the working folder
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not loggers.is_installed("some_tracker")
    assert loggers.is_installed("json")


@pytest.mark.parametrize(
    ("names", "words"),
    [(["tensorbord"], "Did you mean 'tensorboard'"), (["mlflow", "mlflow"], "twice")],
)
def test_names_are_checked(names: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        small_config(output={"loggers": names})


def test_a_tracker_that_fails_ends_no_run_and_is_brought_up_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(loggers, "is_installed", lambda name: True)
    made = fake.init

    def init(**arguments: Any) -> Any:
        state = made(**arguments)
        keep, calls = state.log, []

        def log(row: dict[str, Any], step: int, commit: bool) -> None:
            calls.append(step)
            if len(calls) == 2:
                raise ConnectionError("no route to host\nlong story")
            keep(row, step, commit)

        state.log = log
        return state

    fake.init = init
    with caplog.at_level(logging.WARNING, logger="fedprompt.experiment.trackers"):
        folder = run(config_for(tmp_path / "run", "wandb"), QuietDisplay())
    assert [r.getMessage() for r in caplog.records] == [
        "wandb: no route to host; the run goes on, metrics.jsonl has everything"
    ]
    (state,) = fake.runs
    assert [step for step, _ in state.rows] == list(range(2 * (ROUNDS + 1)))
    assert state.exit == 0
    assert (folder / "summary.json").is_file()


def test_a_tracker_that_cannot_be_opened_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**arguments: Any) -> Any:
        raise RuntimeError("api_key not configured.\nmore")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse, Settings=dict))
    monkeypatch.setattr(loggers, "is_installed", lambda name: True)
    with pytest.raises(UserError, match="wandb cannot be opened: api_key not configured"):
        run(config_for(tmp_path / "run", "tensorboard", "wandb"), QuietDisplay())
    assert not (tmp_path / "run").exists()


def test_a_damaged_state_file_is_named(tmp_path: Path) -> None:
    (tmp_path / STATE).write_text("[1")
    with pytest.raises(UserError, match=r"loggers\.json is damaged"):
        read_state(tmp_path, "mlflow")


def test_only_finite_numbers_are_metrics() -> None:
    line = {
        "kind": "round", "round": 3, "lr": 0.1, "train": {"loss": float("nan"), "ce": 2},
        "personal": {"mean": 0.5, "accuracy": [0.1, 0.9], "clients": [0, 1]}, "ok": True, "x": None,
    }  # fmt: skip
    assert numbers(line) == {"lr": 0.1, "train/ce": 2.0, "personal/mean": 0.5}
    alone = Point.of({**line, "kind": "local_only"}, rounds=5)
    assert alone.place == 9
    assert set(alone.metrics) == {
        "local_only/lr", "local_only/train/ce", "local_only/personal/mean",
    }  # fmt: skip
