from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from fedprompt.config.schema import Config
from fedprompt.errors import UserError
from fedprompt.experiment import run_folder
from fedprompt.experiment.checkpoint import read_tensors
from fedprompt.experiment.compose import compose
from fedprompt.experiment.run_folder import RunFolder
from fedprompt.federation.checkpoint import Checkpoint
from fedprompt.files.checksums import CHECKSUMS
from fedprompt.reports.run_data import CHECKPOINT, CONFIG, METRICS, TIMINGS
from tests.support.builders import small_config


def under(root: Path, **sections: Any) -> Config:
    """A config whose run folder gets its name from the experiment, below `root`."""
    config = small_config(**sections)
    return replace(config, output=replace(config.output, root=str(root)))


@contextmanager
def one_line(match: str) -> Iterator[pytest.ExceptionInfo[UserError]]:
    with pytest.raises(UserError, match=match) as caught:
        yield caught
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


# Folders


def test_the_config_is_kept_and_composes_to_itself(run_config: Callable[..., Config]) -> None:
    config = run_config(training={"lr": 1e-5}, method={"name": "promptfl", "context_tokens": 3})
    folder = RunFolder.create(config)
    assert compose(folder.path / CONFIG) == config
    folder.close()
    again, read = RunFolder.resume(folder.path)
    assert read == config
    again.close()


def test_the_first_free_name_is_taken(tmp_path: Path) -> None:
    config = under(tmp_path / "runs", seed=7)
    names = []
    for _ in range(3):
        folder = RunFolder.create(config)
        names.append(folder.path.name)
        folder.close()
    assert names == ["test-fedrsclip-seed7", "test-fedrsclip-seed7-2", "test-fedrsclip-seed7-3"]
    other = RunFolder.create(under(tmp_path / "runs", seed=8, method={"name": "promptfl"}))
    assert other.path.name == "test-promptfl-seed8"


def test_runs_that_start_at_once_get_their_own_folder(tmp_path: Path) -> None:
    config = under(tmp_path)
    first = RunFolder.create(config)
    second = RunFolder.create(config)
    assert first.path != second.path
    # A folder that another process has made, but not written to yet, is taken as well.
    (tmp_path / "test-fedrsclip-seed1-3").mkdir()
    assert RunFolder.create(config).path.name == "test-fedrsclip-seed1-4"


def test_an_existing_run_is_refused_and_left_alone(run_config: Callable[..., Config]) -> None:
    config = run_config()
    folder = RunFolder.create(config)
    folder.close()
    before = (folder.path / CONFIG).read_bytes()
    with one_line(r"already holds a run.*--resume") as caught:
        RunFolder.create(replace(config, seed=2))
    assert (folder.path / CONFIG).read_bytes() == before
    # Even while somebody still looks at the error and its frames, the lock is free.
    assert caught.value.__traceback__
    RunFolder.resume(folder.path)[0].close()


@pytest.mark.parametrize(
    "name", ["notes.txt", "summary.json", "metrics.jsonl", "config.yaml", ".x"]
)
def test_a_folder_with_somebody_elses_files_is_refused_and_left_alone(
    run_config: Callable[..., Config], name: str
) -> None:
    config = run_config()
    path = Path(str(config.output.dir))
    path.mkdir()
    (path / name).write_text("mine")
    for _ in range(2):
        with one_line(rf"run is not empty and is no run \(it holds '{name}'\)"):
            RunFolder.create(config)
    assert [(p.name, p.read_text()) for p in path.iterdir()] == [(name, "mine")]
    with one_line("holds no run to resume"):
        RunFolder.resume(path)


def test_what_a_failed_sweep_leaves_is_no_foreign_file(run_config: Callable[..., Config]) -> None:
    path = Path(str(run_config().output.dir))
    path.mkdir()
    for name in (".lock", "error.txt"):
        (path / name).touch()
    RunFolder.create(run_config()).close()


def test_only_what_this_process_made_is_removed(run_config: Callable[..., Config]) -> None:
    def make() -> RunFolder:
        folder = RunFolder.create(run_config())
        for name in ("tensorboard", "wandb"):
            (folder.path / name).mkdir()
            (folder.path / name / "log").touch()
        return folder

    folder = make()
    folder.discard_unstarted()
    folder.close()
    assert not folder.path.exists()
    # A folder that was there before, perhaps as a mount point, stays.
    folder.path.mkdir()
    folder = make()
    folder.discard_unstarted()
    folder.close()
    assert [p.name for p in folder.path.iterdir()] == []
    # A resumed run, and one beside which somebody has put a file meanwhile, are left alone.
    folder = make()
    (folder.path / "notes.txt").touch()
    folder.discard_unstarted()
    folder.close()
    (folder.path / "notes.txt").unlink()
    again, _ = RunFolder.resume(folder.path)
    again.discard_unstarted()
    again.close()
    assert {"config.yaml", "tensorboard", "wandb"} <= {p.name for p in folder.path.iterdir()}


def test_a_rewind_removes_our_temporary_files_only(run_config: Callable[..., Config]) -> None:
    folder = RunFolder.create(run_config())
    for name in (".metrics.jsonl.a1b2c3d4.tmp", ".mine.tmp"):
        (folder.path / name).touch()
    folder.rewind(-1)
    assert [p.name for p in folder.path.glob(".*.tmp")] == [".mine.tmp"]


def test_one_holder_at_a_time(run_config: Callable[..., Config]) -> None:
    folder = RunFolder.create(run_config())
    with one_line("in use by another process"):
        RunFolder.resume(folder.path)
    code = (
        "import sys\nfrom pathlib import Path\nfrom filelock import FileLock, Timeout\n"
        "try:\n    FileLock(Path(sys.argv[1]) / '.lock').acquire(timeout=0)\n"
        "except Timeout:\n    print('held')\nelse:\n    print('free')\n"
    )
    command = [sys.executable, "-c", code, str(folder.path)]
    held = subprocess.run(command, capture_output=True, text=True, check=True)
    folder.close()
    free = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (held.stdout, free.stdout) == ("held\n", "free\n")


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with one_line("holds no run to resume"):
        RunFolder.resume(tmp_path)
    with one_line("holds no run to resume"):
        RunFolder.resume(tmp_path / "nowhere")


def test_a_run_that_is_killed_at_its_first_file_can_be_resumed(
    run_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: RunFolder) -> None:
        folder.close()
        raise KeyboardInterrupt

    config = run_config()
    monkeypatch.setattr(RunFolder, "record_versions", killed)
    with pytest.raises(KeyboardInterrupt):
        RunFolder.create(config)
    monkeypatch.undo()
    folder, again = RunFolder.resume(Path(str(config.output.dir)))
    folder.close()
    assert again == config
    # The same files without the run's own list are somebody else's.
    (folder.path / CHECKSUMS).unlink()
    (folder.path / "versions.json").unlink()
    with one_line("holds no run"):
        RunFolder.resume(folder.path)


def test_a_damaged_config_does_not_keep_the_lock(run_config: Callable[..., Config]) -> None:
    folder = RunFolder.create(run_config())
    folder.close()
    good = (folder.path / CONFIG).read_text()
    (folder.path / CONFIG).write_text("seed: [")
    with one_line("not valid YAML"):
        RunFolder.resume(folder.path)
    (folder.path / CONFIG).write_text(good)
    RunFolder.resume(folder.path)[0].close()


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    config = under(tmp_path / "file" / "runs")
    with one_line("cannot create run folder"):
        RunFolder.create(config)
    for path in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with one_line("cannot create run folder"):
            RunFolder.create(replace(config, output=replace(config.output, dir=str(path))))
    with one_line("cannot write to"):
        RunFolder(tmp_path / "file" / "run")


@pytest.mark.parametrize("name", ["write", "append", "checkpoint"])
def test_a_full_disk_is_one_line_that_says_how_to_go_on(
    run_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = RunFolder.create(run_config())

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with one_line(r"No space left on device.*--resume"):
        if name == "write":
            folder.write("a.json", b"{}")
        elif name == "append":
            folder.append(METRICS, {"round": 0})
        else:
            folder.save_checkpoint(Checkpoint(0, {}, {}, {}))
    assert folder.load_checkpoint() is None
    assert not list(folder.path.glob("*.tmp"))


# Lines


@pytest.fixture
def folder(run_config: Callable[..., Config]) -> Iterator[RunFolder]:
    held = RunFolder.create(run_config())
    yield held
    held.close()


def test_lines_come_back_as_they_went(folder: RunFolder) -> None:
    records = [{"kind": "round", "round": r, "x": 0.1 + r, "t": "a\u2028b\nc"} for r in range(3)]
    for record in records:
        folder.append(METRICS, record)
    assert folder.lines(METRICS) == records
    assert folder.lines("nothing.jsonl") == []


@pytest.mark.parametrize("torn", [b'{"round": 3, "x": 0.', b'{"round": 3}', b"\xff\xfe", b"{\n"])
def test_a_torn_last_line_is_left_out(folder: RunFolder, torn: bytes) -> None:
    folder.append(METRICS, {"round": 2})
    with (folder.path / METRICS).open("ab") as stream:
        stream.write(torn)
    assert folder.lines(METRICS) == [{"round": 2}]


def test_nan_is_refused_where_json_has_none(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="JSON"):
        folder.append(METRICS, {"loss": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        folder.write_json("summary.json", {"loss": float("inf")})
    assert folder.lines(METRICS) == []


def test_write_json_replaces(folder: RunFolder) -> None:
    folder.write_json("summary.json", {"a": 1})
    folder.write_json("summary.json", {"b": 0.1})
    assert json.loads((folder.path / "summary.json").read_text()) == {"b": 0.1}


def test_a_list_of_numbers_is_one_line_of_json(folder: RunFolder) -> None:
    value = {
        "rows": [[1, 2], [], [3]],
        "names": ["a [\n1]", "[0,\n 1]", '"'],
        "nested": {"x": [0.5, None], "y": [{"z": [True]}]},
    }
    folder.write_json("summary.json", value)
    text = (folder.path / "summary.json").read_text()
    assert json.loads(text) == value
    assert "    [1, 2],\n    [],\n    [3]\n" in text
    assert '"x": [0.5, null]' in text


def test_rewind_drops_what_came_after(folder: RunFolder) -> None:
    for server_round in range(4):
        folder.append(METRICS, {"kind": "round", "round": server_round, "x": 0.1 * server_round})
        folder.append(TIMINGS, {"round": server_round, "train_s": 1.5})
        if server_round == 2:
            kept = (folder.path / METRICS).read_bytes()
    folder.append(METRICS, {"kind": "local_only", "round": 0})
    with (folder.path / METRICS).open("ab") as stream:
        stream.write(b'{"kind": "rou')
    (folder.path / ".checkpoint.safetensors.abc.tmp").write_bytes(b"half")
    folder.rewind(2)
    assert (folder.path / METRICS).read_bytes() == kept
    assert [r["round"] for r in folder.lines(TIMINGS)] == [0, 1, 2]
    assert not list(folder.path.glob(".*.tmp"))
    folder.append(METRICS, {"kind": "round", "round": 3})
    assert [r["round"] for r in folder.lines(METRICS)] == [0, 1, 2, 3]
    folder.rewind(-1)
    assert folder.lines(METRICS) == folder.lines(TIMINGS) == []


def test_rewind_of_a_fresh_folder_makes_no_files(folder: RunFolder) -> None:
    before = sorted(os.listdir(folder.path))
    folder.rewind(-1)
    assert sorted(os.listdir(folder.path)) == before


# Checkpoints

AWKWARD = torch.tensor([[0.1, -0.0], [1e-45, 3.4e38]])


def test_a_checkpoint_comes_back_bit_for_bit(folder: RunFolder) -> None:
    assert folder.load_checkpoint() is None
    checkpoint = Checkpoint(
        server_round=12,
        shared={"ctx": AWKWARD, "deep/0": torch.arange(6.0).view(2, 3).T},
        private="0123456789abcdef",
        strategy={"momentum": torch.tensor([0.1], dtype=torch.float64)},
        totals={"bytes_up": 2**60, "rejected": 1},
    )
    folder.save_checkpoint(checkpoint)
    loaded = folder.load_checkpoint()
    assert loaded is not None
    assert (loaded.server_round, loaded.totals) == (12, checkpoint.totals)
    assert loaded.private == checkpoint.private
    for group in ("shared", "strategy"):
        saved, read = getattr(checkpoint, group), getattr(loaded, group)
        assert set(read) == set(saved)
        for name, tensor in saved.items():
            assert read[name].dtype == tensor.dtype
            assert read[name].shape == tensor.shape
            assert read[name].numpy().tobytes() == tensor.numpy().tobytes()


def test_an_empty_checkpoint_comes_back_empty(folder: RunFolder) -> None:
    empty = Checkpoint(0, {}, {}, {})
    folder.save_checkpoint(empty)
    assert folder.load_checkpoint() == empty


def test_groups_may_hold_one_memory(folder: RunFolder) -> None:
    # A server optimiser may keep the last shared tensors themselves as its state.
    folder.save_checkpoint(Checkpoint(1, {"ctx": AWKWARD}, {"last": AWKWARD}, {}))
    loaded = folder.load_checkpoint()
    assert loaded is not None
    assert torch.equal(loaded.strategy["last"], AWKWARD)


def test_a_crash_while_saving_keeps_the_last_checkpoint(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.save_checkpoint(Checkpoint(1, {"ctx": AWKWARD}, {}, {}))

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            folder.save_checkpoint(Checkpoint(2, {"ctx": AWKWARD + 1}, {}, {}))
    loaded = folder.load_checkpoint()
    assert loaded is not None
    assert loaded.server_round == 1


def test_a_loaded_checkpoint_outlives_its_file(folder: RunFolder) -> None:
    folder.save_checkpoint(Checkpoint(1, {"ctx": AWKWARD}, {}, {}))
    loaded = folder.load_checkpoint()
    folder.save_checkpoint(Checkpoint(2, {"ctx": AWKWARD + 1}, {}, {}))
    assert loaded is not None
    assert torch.equal(loaded.shared["ctx"], AWKWARD)


WHOLE = save(
    {"shared/ctx": torch.zeros(2, 2)},
    metadata={"round": "1", "totals": json.dumps({"up": 1}), "private": ""},
)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "damaged"),
        (b"garbage that is no checkpoint", "damaged"),
        (WHOLE[:-1], "damaged"),
        (WHOLE[:40], "damaged"),
        (save({"shared/ctx": torch.zeros(1)}), "not a fedprompt checkpoint"),
        (
            save({"ctx": torch.zeros(1)}, metadata={"round": "1", "totals": "{}"}),
            "not a fedprompt checkpoint",
        ),
        (
            save({}, metadata={"round": "one", "totals": "{}", "private": ""}),
            "not a fedprompt checkpoint",
        ),
        (
            save({}, metadata={"round": "1", "totals": "{", "private": ""}),
            "not a fedprompt checkpoint",
        ),
        (save({}, metadata={"round": "1", "totals": "{}"}), "not a fedprompt checkpoint"),
    ],
    ids=[
        "empty",
        "garbage",
        "short",
        "shorter",
        "no header",
        "no group",
        "round",
        "totals",
        "seal",
    ],
)
def test_a_damaged_checkpoint_is_one_line(folder: RunFolder, content: bytes, match: str) -> None:
    (folder.path / CHECKPOINT).write_bytes(content)
    with one_line(f"{match}.*remove it"):
        folder.load_checkpoint()


def test_read_tensors_names_a_missing_file(tmp_path: Path) -> None:
    with one_line("no file"):
        read_tensors(tmp_path / "nothing.safetensors")


def test_versions_are_recorded_and_a_change_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(output={"dir": str(tmp_path / "run")})
    monkeypatch.setattr(run_folder, "versions", lambda: {"torch": "1", "flwr": "2"})
    RunFolder.create(config).close()
    RunFolder.resume(tmp_path / "run")[0].close()
    assert json.loads((tmp_path / "run" / "versions.json").read_text()) == [
        {"torch": "1", "flwr": "2"}
    ]
    assert not caplog.records
    monkeypatch.setattr(run_folder, "versions", lambda: {"torch": "3", "flwr": "2"})
    RunFolder.resume(tmp_path / "run")[0].close()
    assert len(json.loads((tmp_path / "run" / "versions.json").read_text())) == 2
    assert "torch 1, now 3" in caplog.text
    assert "flwr" not in caplog.text


def test_the_versions_of_a_finished_run_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunFolder.create(small_config(output={"dir": str(tmp_path / "run")})).close()
    (tmp_path / "run" / "summary.json").write_text("{}")
    before = (tmp_path / "run" / "versions.json").read_bytes()
    monkeypatch.setattr(run_folder, "versions", lambda: {"torch": "1"})
    RunFolder.resume(tmp_path / "run")[0].close()
    assert (tmp_path / "run" / "versions.json").read_bytes() == before
