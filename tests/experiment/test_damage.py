"""A flipped bit in any file that a result depends on is noticed when the file is read."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedprompt.config.schema import Config
from fedprompt.errors import DamagedFile, StopRun, UserError
from fedprompt.experiment.checkpoint import read_checkpoint
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.predict import Classifier
from fedprompt.experiment.run import resume, run
from fedprompt.files.checksums import CHECKSUMS
from fedprompt.reports.run_data import CHECKPOINT, PRIVATE, load_run
from fedprompt.simulation.private_log import PrivateLog
from tests.support.builders import small_config

ROUNDS, CLIENTS = 4, 3


def config_for(folder: Path) -> Config:
    config = small_config(
        data={"images_per_class": 4, "domains": ["savanna"]},
        federation={"rounds": ROUNDS},
        partition={"clients": CLIENTS},
    )
    return replace(config, output=replace(config.output, dir=str(folder)))


class StopAt(QuietDisplay):
    def __init__(self, server_round: int) -> None:
        super().__init__()
        self._last = server_round

    def round(self, record: object, eta_s: float | None) -> None:
        if record["round"] == self._last:  # type: ignore[index]
            raise StopRun


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(config_for(tmp_path_factory.mktemp("finished") / "run"), QuietDisplay())


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(config_for(tmp_path_factory.mktemp("stopped") / "run"), StopAt(2))


def flipped(path: Path, place: float) -> bytes:
    """Flip one bit at a place from 0 (start) to 1 (end); returns the bytes before."""
    whole = path.read_bytes()
    at = min(int(place * len(whole)), len(whole) - 1)
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x04]) + whole[at + 1 :])
    return whole


def every_private_state(folder: Path) -> None:
    checkpoint = read_checkpoint(folder / CHECKPOINT)
    log = PrivateLog(folder / PRIVATE, CLIENTS)
    log.read(checkpoint.server_round, checkpoint.private)
    for client in range(CLIENTS):
        log.get(client)


READERS: dict[str, Callable[[Path], object]] = {
    "config.yaml": load_run,
    "partition.json": load_run,
    "metrics.jsonl": load_run,
    "timings.jsonl": load_run,
    "summary.json": load_run,
    CHECKSUMS: load_run,
    "prompts.safetensors": Classifier,
    CHECKPOINT: lambda folder: read_checkpoint(folder / CHECKPOINT),
    "private": every_private_state,
}


@pytest.mark.parametrize("name", READERS)
def test_a_finished_run(finished: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    READERS[name](folder)
    path = next((folder / PRIVATE).iterdir()) if name == "private" else folder / name
    for place in (0.0, 0.33, 0.5, 0.77, 0.95, 1.0):
        whole = flipped(path, place)
        with pytest.raises(UserError, match=r"damaged|changed") as caught:
            READERS[name](folder)
        assert path.name in str(caught.value) or name == CHECKSUMS
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["config.yaml", "partition.json", "metrics.jsonl", "private"])
def test_a_run_that_is_resumed(stopped: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    path = max((folder / PRIVATE).iterdir()) if name == "private" else folder / name
    before = flipped(path, 0.9)
    with pytest.raises(UserError, match=path.name):
        resume(folder, QuietDisplay())
    path.write_bytes(before)
    resume(folder, QuietDisplay())


def test_a_stopped_run_ends_in_the_same_bits_with_the_same_checksums(
    stopped: Path, finished: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    resume(folder, QuietDisplay())
    for name in ("metrics.jsonl", "prompts.safetensors"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes()
    # The format of `sha256sum`.
    lines = (folder / CHECKSUMS).read_text().splitlines()
    listed = {line.split("  ")[1]: line.split("  ")[0] for line in lines}
    assert {*listed} == {*READERS} - {CHECKSUMS, CHECKPOINT, "private"}
    for name, digest in listed.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("kept", [0, 3])
def test_a_list_of_checksums_that_was_cut_off_is_noticed(
    finished: Path, tmp_path: Path, kept: int
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    lines = (folder / CHECKSUMS).read_text().splitlines(keepends=True)
    (folder / CHECKSUMS).write_text("".join(lines[:kept]))
    with pytest.raises(DamagedFile, match=rf"{CHECKSUMS} is damaged: it has no line for "):
        load_run(folder)
    name = lines[0].replace("config", "cknfig")
    (folder / CHECKSUMS).write_text("".join([name, *lines[1:]]))
    with pytest.raises(DamagedFile, match=r"no line for config\.yaml"):
        load_run(folder)


def test_a_run_of_an_older_version_is_read_and_gets_checksums(
    stopped: Path, finished: Path, tmp_path: Path
) -> None:
    old = shutil.copytree(finished, tmp_path / "old")
    (old / CHECKSUMS).unlink()
    assert load_run(old).summary
    begun = shutil.copytree(stopped, tmp_path / "begun")
    (begun / CHECKSUMS).unlink()
    resume(begun, QuietDisplay())
    flipped(begun / "config.yaml", 0.5)
    with pytest.raises(DamagedFile):
        load_run(begun)


# Resuming with another config


@pytest.mark.parametrize("key", ["lr", "rounds"])
def test_an_edited_config_is_refused_and_the_key_is_named(
    stopped: Path, tmp_path: Path, key: str
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    path = folder / "config.yaml"
    text = path.read_text()
    section = {"lr": "training", "rounds": "federation"}[key]
    line = next(x for x in text.splitlines() if x.startswith(f"  {key}: "))
    path.write_text(text.replace(line, f"  {key}: 7"))
    with pytest.raises(UserError, match=rf"{section}\.{key} was .* and is 7"):
        resume(folder, QuietDisplay())
    # Another layout of the same values is no change.
    path.write_text(f"# my notes\n{text}")
    resume(folder, QuietDisplay())


def test_other_keys_than_rounds_cannot_be_given(stopped: Path) -> None:
    with pytest.raises(UserError, match=r"training\.lr cannot be changed"):
        resume(stopped, QuietDisplay(), overrides=["training.lr=0.5"])
    with pytest.raises(UserError, match=r"has already done 2 rounds"):
        resume(stopped, QuietDisplay(), overrides=["federation.rounds=1"])


class Notes(QuietDisplay):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("which", ["stopped", "finished"])
def test_a_run_goes_on_for_longer(
    request: pytest.FixtureRequest, tmp_path: Path, which: str
) -> None:
    before: Path = request.getfixturevalue(which)
    folder, notes = shutil.copytree(before, tmp_path / "run"), Notes()
    resume(folder, notes, overrides=["federation.rounds=6"])
    done = ROUNDS if which == "finished" else 2
    (said,) = [text for text in notes.said if "rounds" in text]
    assert f"6 rounds instead of {ROUNDS}" in said
    assert f"learning rate of round {done + 1}" in said
    data = load_run(folder)
    assert data.summary is not None
    assert data.summary["rounds"] == 6
    assert [line["round"] for line in data.rounds] == list(range(7))
    old = (before / "metrics.jsonl").read_bytes().splitlines()[: done + 1]
    assert (folder / "metrics.jsonl").read_bytes().splitlines()[: done + 1] == old
    # The longer run is a run like others: nothing is left to do.
    resume(folder, QuietDisplay())


# Cached features


def test_a_run_ends_where_cached_features_are_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDPROMPT_CACHE", str(tmp_path / "cache"))
    run(config_for(tmp_path / "first"), StopAt(0))
    (path,) = (tmp_path / "cache" / "features").rglob("*.rows")
    whole = flipped(path, 0.5)
    with pytest.raises(DamagedFile, match=path.name):
        run(config_for(tmp_path / "second"), QuietDisplay())
    # What the message advises.
    path.unlink()
    run(config_for(tmp_path / "third"), StopAt(0))
    (path,) = (tmp_path / "cache" / "features").rglob("*.rows")
    assert path.read_bytes() == whole
