"""Output that cannot be written, and small things about files and texts, end no command."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

import pytest
import yaml

from fedprompt import files
from fedprompt.cli import main as cli
from fedprompt.cli.output import LastingOutput
from fedprompt.data.cache_files import digest
from fedprompt.errors import UserError
from fedprompt.experiment.trackers import Loggers
from fedprompt.simulation.ray_cluster import brief
from fedprompt.sweeps.plan import yaml_text
from tests.support.builders import small_config


def test_a_reader_that_goes_away_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    stream = LastingOutput(io.FileIO(writing, "w"), encoding="utf-8", write_through=True)
    stream.write("first\n")
    assert os.read(reading, 100) == b"first\n"
    os.close(reading)
    for _ in range(3):
        stream.write("more\n")
        stream.flush()
    stream.close()
    assert capsys.readouterr().err.count("Broken pipe") == 1


def test_a_removed_working_folder_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setattr("sys.argv", ["fedprompt", "list"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "working folder" in capsys.readouterr().err


def test_files_follow_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "UMASK", 0o027)
    files.write_bytes(tmp_path / "open", b"")
    files.write_bytes(tmp_path / "secret", b"", mode=0o600)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("open", "secret")]
    assert modes == [0o640, 0o600]


@pytest.mark.parametrize("value", ["\U0001f600 a", "\\ud83d\\ude00", ["\U0001f680", 1], "\u2028"])
def test_values_of_a_grid_survive_as_overrides(value: object) -> None:
    assert yaml.safe_load(yaml_text(value)) == value


def test_names_need_not_be_utf8() -> None:
    assert digest(os.fsdecode(b"caf\xe9")) != digest(os.fsdecode(b"caf\xe8"))


def test_a_long_error_is_cut_between_words() -> None:
    text = brief(ValueError(f"{'word' * 10} " * 20 + "the reason"))
    assert text.startswith("... wordword")
    assert text.split()[1] == "word" * 10
    assert text.endswith("the reason")
    assert brief(ValueError("short")) == "short"


def test_a_tracker_does_not_keep_a_run_from_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(output={"loggers": ["mlflow", "tensorboard"]})
    monkeypatch.setattr("fedprompt.experiment.trackers.is_installed", lambda name: False)
    loggers = Loggers(config, tmp_path)
    with pytest.raises(UserError, match="mlflow"):
        loggers.open()
    loggers.open(resumed=True)
    loggers.line({"kind": "round", "round": 1})
    loggers.close()
    assert "mlflow cannot be opened" in caplog.text
    assert "tensorboard cannot be opened" in caplog.text
