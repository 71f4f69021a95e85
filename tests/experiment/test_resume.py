"""`--resume` after a real `kill -9` ends in the same bits as a run that was never broken."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedprompt.config.schema import Config, to_yaml
from fedprompt.errors import UserError
from fedprompt.experiment.checkpoint import read_checkpoint
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import resume, run
from fedprompt.experiment.run_folder import RunFolder
from fedprompt.reports.run_data import CHECKPOINT, MEASURED, PRIVATE
from fedprompt.simulation.private_log import PrivateLog
from tests.support.builders import small_config

Condition = Callable[[Path], bool]
SECTIONS = {
    "data": {"images_per_class": 8, "domains": ["savanna"]},
    "federation": {"rounds": 12, "fraction": 0.75},
    "partition": {"clients": 4, "alpha": 1.0},
    "evaluation": {"local_only": True},
    # More has to be restored than with the default.
    "training": {"momentum_state": "keep"},
}


def config_for(folder: Path) -> Config:
    config = small_config(**SECTIONS)
    return replace(config, output=replace(config.output, dir=str(folder)))


def metric_lines(folder: Path, kind: str) -> int:
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return sum(f'"kind": "{kind}"' in line for line in text.splitlines())


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "fedprompt", "run", *arguments, "--quiet"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def kill_when(process: subprocess.Popen[bytes], folder: Path, reached: Condition) -> None:
    deadline = time.monotonic() + 120
    while not reached(folder):
        assert process.poll() is None, process.communicate()[1].decode()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(config_for(tmp_path_factory.mktemp("unbroken") / "run"), QuietDisplay())


def assert_same_results(folder: Path, unbroken: Path) -> None:
    for name in ("prompts.safetensors", "metrics.jsonl", "partition.json"):
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes(), name
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (folder, unbroken))
    for summary in (ours, theirs):
        for name in MEASURED:
            assert summary.pop(name), name
    assert ours["client_steps"] > 0
    assert ours == theirs
    assert private_states(folder) == private_states(unbroken)
    assert not [*folder.glob(".*.tmp"), *folder.glob("private/.*.tmp")]


def private_states(folder: Path) -> dict[int, dict[str, bytes]]:
    """Every client's private tensors as a run's last checkpoint has them."""
    checkpoint = read_checkpoint(folder / CHECKPOINT)
    log = PrivateLog(folder / PRIVATE, 4)
    log.read(checkpoint.server_round, checkpoint.private)
    states = {c: log.get(c) or {} for c in range(4)}
    assert all(states.values()), "in twelve rounds everyone has trained"
    return {c: {n: t.numpy().tobytes() for n, t in s.items()} for c, s in states.items()}


MOMENTS = {
    "before the first round": lambda f: (f / "config.yaml").is_file(),
    "in the middle": lambda f: metric_lines(f, "round") >= 5,
    "in the local-only baseline": lambda f: metric_lines(f, "local_only") >= 3,
}


@pytest.mark.parametrize(
    "moment",
    [
        "in the middle",
        pytest.param("before the first round", marks=pytest.mark.slow),
        pytest.param("in the local-only baseline", marks=pytest.mark.slow),
    ],
)
def test_kill_and_resume(tmp_path: Path, unbroken: Path, moment: str) -> None:
    folder = tmp_path / "run"
    (tmp_path / "experiment.yaml").write_text(to_yaml(config_for(folder)))
    kill_when(start([str(tmp_path / "experiment.yaml")]), folder, MOMENTS[moment])
    assert not (folder / "summary.json").exists()
    resume(folder, QuietDisplay())
    assert_same_results(folder, unbroken)


# Kills itself before the n-th call of a function whose last argument's name matches a pattern.
KILLER = """
import os, re, signal, sys
from pathlib import Path
owner, name, pattern, count = sys.argv[1:5]
owner = {"os": os, "Path": Path}[owner]
call, calls = getattr(owner, name), []

def dying(*arguments, **options):
    calls.extend(re.findall(pattern, str([a for a in arguments if a is not None][-1])))
    if len(calls) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return call(*arguments, **options)

setattr(owner, name, dying)
sys.argv = ["fedprompt", "run", *sys.argv[5:], "--quiet"]
from fedprompt.cli.main import main
main()
"""
STEPS = {
    "private file half written": ("os", "replace", r"private/round-000005", 1),
    "private file written, checkpoint not": ("os", "replace", r"/checkpoint\.safetensors", 6),
    "checkpoint written, nothing cleaned yet": ("Path", "unlink", r"private/round-\d+\.saf", 1),
    "in the middle of cleaning": ("Path", "unlink", r"private/round-\d+\.saf", 3),
}


@pytest.mark.parametrize(
    "step",
    [
        pytest.param("private file half written", marks=pytest.mark.slow),
        "private file written, checkpoint not",
        pytest.param("checkpoint written, nothing cleaned yet", marks=pytest.mark.slow),
        pytest.param("in the middle of cleaning", marks=pytest.mark.slow),
    ],
)
def test_killed_between_private_tensors_and_checkpoint(
    tmp_path: Path, unbroken: Path, step: str
) -> None:
    folder = tmp_path / "run"
    (tmp_path / "experiment.yaml").write_text(to_yaml(config_for(folder)))
    arguments = [*map(str, STEPS[step]), str(tmp_path / "experiment.yaml")]
    killed = subprocess.run([sys.executable, "-c", KILLER, *arguments], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert not (folder / "summary.json").exists()
    assert (folder / CHECKPOINT).exists()
    resume(folder, QuietDisplay())
    assert_same_results(folder, unbroken)
    files = {p.name: p.read_bytes() for p in (folder / PRIVATE).iterdir()}
    assert files == {p.name: p.read_bytes() for p in (unbroken / PRIVATE).iterdir()}


def test_a_run_whose_private_files_are_gone_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    _run_until(config_for(folder), 4)
    newest = max((folder / PRIVATE).iterdir())
    newest.unlink()
    with pytest.raises(UserError, match="files are missing or were changed") as caught:
        resume(folder, QuietDisplay())
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path, unbroken: Path) -> None:
    """Every attempt gets two rounds further; the command line resumes each time."""
    folder = tmp_path / "run"
    (tmp_path / "experiment.yaml").write_text(to_yaml(config_for(folder)))
    arguments = [str(tmp_path / "experiment.yaml")]
    for lines in (2, 6, 10):
        kill_when(start(arguments), folder, lambda f, n=lines: metric_lines(f, "round") >= n)  # type: ignore[misc]
        arguments = ["--resume", str(folder)]
    last = start(arguments)
    _, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors.decode()[-2000:]
    assert_same_results(folder, unbroken)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after round 7, two rounds after its checkpoint."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    config = config_for(folder)
    _run_until(replace(config, output=replace(config.output, checkpoint_every=5)), 7)
    assert metric_lines(folder, "round") == 8
    return folder


@pytest.mark.parametrize("torn", ["line without a checkpoint", "half a line", "stray file"])
def test_every_state_a_kill_can_leave(
    tmp_path: Path, unbroken: Path, stopped: Path, torn: str
) -> None:
    """Between a metrics line and its checkpoint, in the middle of a line, in a file's writing."""
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    if torn == "half a line":
        with (folder / "metrics.jsonl").open("a") as stream:
            stream.write('{"kind": "round", "roun')
    if torn == "stray file":
        (folder / ".checkpoint.safetensors.abc.tmp").write_bytes(b"half")
    resume(folder, QuietDisplay())
    assert_same_results(folder, unbroken)


class _Stop(Exception):
    pass


def _run_until(config: Config, last_round: int) -> None:
    class Stopping(QuietDisplay):
        def round(self, record: object, eta_s: float | None) -> None:
            if record["round"] == last_round:  # type: ignore[index]
                raise _Stop

    with pytest.raises(_Stop):
        run(config, Stopping())


def test_a_finished_run_is_left_as_it_is(unbroken: Path) -> None:
    before = {p.name: p.read_bytes() for p in unbroken.iterdir() if p.is_file()}
    resume(unbroken, QuietDisplay())
    assert {p.name: p.read_bytes() for p in unbroken.iterdir() if p.is_file()} == before


def test_two_processes_do_not_write_one_run(tmp_path: Path) -> None:
    folder = RunFolder.create(config_for(tmp_path / "run"))
    with pytest.raises(UserError, match="in use"):
        resume(tmp_path / "run", QuietDisplay())
    folder.close()


def test_other_data_than_the_run_began_with_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    _run_until(config_for(folder), 4)
    path = folder / "partition.json"
    other = json.loads(path.read_text())
    other["train_counts"] = other["train_counts"][::-1]
    path.write_text(json.dumps(other))
    # As if the data were other ones: with its checksum, the file itself would be refused first.
    (folder / "checksums.txt").unlink()
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    with pytest.raises(UserError, match=r"is not what .*partition\.json says it was") as caught:
        resume(folder, QuietDisplay())
    assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
