"""The entry in docs/new_dataset.md is one: found, read from a folder, federated."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from fedprompt.data import catalogue, open_dataset
from fedprompt.data.check_copy import check
from fedprompt.experiment.compose import compose
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import run
from tests.support import ROOT

DOC = ROOT / "docs" / "new_dataset.md"
NAME = "coastal_scenes"
FOLDERS = ("beach", "ferryterminal", "tidalflat")


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[catalogue.Entry]:
    """The example as a file beside the shipped entries."""
    text = re.findall(r"^```yaml\n(.*?)^```", DOC.read_text(), re.MULTILINE | re.DOTALL)[0]
    here = tmp_path / "catalogue"
    shutil.copytree(catalogue.HERE, here, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (here / f"{NAME}.yaml").write_text(text)
    monkeypatch.setattr(catalogue, "HERE", here)
    catalogue.entry.cache_clear()
    yield catalogue.entry(NAME)
    catalogue.entry.cache_clear()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The authors' folder, as the entry says it is laid out."""
    for c, folder in enumerate(FOLDERS):
        place = tmp_path / "data" / "coastal_scenes" / "images" / folder
        place.mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (64, 64), (90 * c, 20 * i, 0)).save(place / f"{i}.png")
    return tmp_path / "data"


def test_the_folder_agrees_with_the_entry(entry: catalogue.Entry, copy: Path) -> None:
    assert check(entry, copy, "auto").ok
    (copy / "coastal_scenes" / "images" / "beach" / "0.png").unlink()
    assert not check(entry, copy, "auto").ok


def test_it_is_a_data_set(entry: catalogue.Entry, copy: Path) -> None:
    config = compose("quickstart", [f"data={NAME}", f"data.root={copy}"])
    dataset = open_dataset(config.data, 1)
    assert dataset.class_names == ("beach", "ferry terminal", "tidal flat")
    assert config.data.templates == ["a satellite photo of a {}."]
    assert len(dataset) == entry.images


def test_it_federates(entry: catalogue.Entry, copy: Path, tmp_path: Path) -> None:
    changes = [
        f"data={NAME}", f"data.root={copy}", "partition.clients=2", "partition.alpha=1",
        "federation.rounds=1", "evaluation.local_only=false", "output.report=false",
        f"output.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    assert (run(compose("quickstart", changes), QuietDisplay()) / "summary.json").is_file()
