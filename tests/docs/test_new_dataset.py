"""The examples in docs/new_dataset.md: the catalogue entry and the data source work as they say."""

from __future__ import annotations

import importlib.util
import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import fedprompt
from fedprompt.config.shipped import configs_dir
from fedprompt.data import catalogue, open_dataset, sources
from fedprompt.data.check_copy import check
from fedprompt.errors import UserError
from fedprompt.experiment.compose import compose
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import run
from tests.support import ROOT
from tests.support.doc_pages import source_files

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
    config = compose("label_skew", [f"data={NAME}", f"data.root={copy}"])
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
    assert (run(compose("label_skew", changes), QuietDisplay()) / "summary.json").is_file()


@pytest.fixture
def array_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example of a source beside the shipped sources and config files; gives its test."""
    for path, text in source_files(DOC.read_text()).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    shutil.copytree(configs_dir(), tmp_path / "configs", dirs_exist_ok=True)
    monkeypatch.setattr("fedprompt.config.shipped.configs_dir", lambda: tmp_path / "configs")
    places = [*sources.__path__, str(tmp_path / "fedprompt" / "data" / "sources")]
    monkeypatch.setattr(sources, "__path__", places)
    file = tmp_path / "tests" / "data" / "sources" / "test_array_file.py"
    spec = importlib.util.spec_from_file_location("test_array_file", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("fedprompt.data.sources.array_file", None)


def test_the_test_of_the_source_passes(array_file: ModuleType, tmp_path: Path) -> None:
    array_file.test_images_and_labels_are_those_of_the_file(tmp_path)
    array_file.test_a_label_without_a_name_is_refused(tmp_path)


def test_the_source_refuses_what_it_cannot_read(array_file: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="root"):
        compose("label_skew", ["data=array_file"])
    (tmp_path / "text.npz").write_text("no arrays")
    with pytest.raises(UserError, match=r"text\.npz"):
        fedprompt.data.open("array_file", root=str(tmp_path / "text.npz"))
    np.savez(tmp_path / "part.npz", images=np.zeros((2, 4, 4, 3), dtype=np.uint8))
    with pytest.raises(UserError, match=r"part\.npz.*class_names"):
        fedprompt.data.open("array_file", root=str(tmp_path / "part.npz"))
    grey = {"images": np.zeros((2, 4, 4), dtype=np.uint8), "labels": [0, 1]}
    np.savez(tmp_path / "grey.npz", class_names=["a", "b"], **grey)
    with pytest.raises(UserError, match=r"grey\.npz.*images"):
        fedprompt.data.open("array_file", root=str(tmp_path / "grey.npz"))


def test_a_pixel_changes_the_fingerprint(array_file: ModuleType, tmp_path: Path) -> None:
    path = array_file.write(tmp_path, [0, 1] * 4)
    before = fedprompt.data.open("array_file", root=path)
    arrays = dict(np.load(path))
    arrays["images"][0, 0, 0, 0] ^= 1
    np.savez(path, **arrays)
    after = fedprompt.data.open("array_file", root=path)
    assert before.fingerprint != after.fingerprint
    assert pickle.loads(pickle.dumps(after)).open_image(0).mode == "RGB"


def test_the_source_federates(array_file: ModuleType, tmp_path: Path) -> None:
    path = array_file.write(tmp_path, [0, 1] * 4)
    changes = [
        "data=array_file", f"data.root={path}", "partition.clients=2", "partition.alpha=10",
        "partition.min_images=1", "federation.rounds=1", "evaluation.local_only=false",
        "output.report=false", f"output.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    assert (run(compose("label_skew", changes), QuietDisplay()) / "summary.json").is_file()
