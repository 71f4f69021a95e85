"""CoOp's split files define the split and the order of the labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprompt.data.catalogue import entry
from fedprompt.data.dataset import TEST, TRAIN, VAL
from fedprompt.data.sources.parts import published
from tests.support.published_copies import make, split_json
from tests.support.published_loading import NAMES, load, one_line

pytestmark = pytest.mark.usefixtures("few_classes")


COOP = [name for name in NAMES if entry(name).coop_split]


@pytest.mark.parametrize("name", COOP)
def test_a_split_file_defines_splits_and_label_order(name: str, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    made = make(name, root)
    coop = entry(name).coop_split
    assert coop is not None
    images = published.open_copy(entry(name), root).images_folder(entry(name).layout["images"])
    keys = sorted({item.key for item in made}, reverse=True)  # not the official order
    names = {key: f"Class_{k}" for k, key in enumerate(keys)}
    path = split_json(root / coop.file, images, made, names, keys)
    stored = json.loads(path.read_text())
    dataset = load(name, root)
    assert dataset.class_names == tuple(f"Class {k}" for k in range(len(keys)))
    opener: Any = dataset.open_image
    got = {
        (path, int(label), int(split))
        for path, label, split in zip(opener.paths, dataset.labels_N, dataset.split_N, strict=True)
    }
    assert got == {(p, label, TRAIN) for p, label, _ in stored["train"]} | {
        (p, label, TEST) for p, label, _ in stored["test"]
    }
    assert len(load(name, root, validation="train")) == len(made)
    # As the server's validation images, they change nothing about the others.
    whole = load(name, root, validation="server")
    assert len(whole) == len(made)
    paths: Any = whole.open_image
    of_val = {paths.paths[i] for i in np.flatnonzero(whole.split_N == VAL)}
    assert of_val == {p for p, _, _ in stored["val"]}
    kept = np.flatnonzero(whole.split_N != VAL)
    assert [paths.paths[i] for i in kept] == list(opener.paths)
    assert whole.split_N[kept].tolist() == dataset.split_N.tolist()
    assert load(name, root, split="official").class_names != dataset.class_names


def test_names_in_a_split_file_take_the_entrys_spelling(tmp_path: Path) -> None:
    root = tmp_path / "copy"
    made = make("eurosat", root)
    spelled = {key: name.title() for key, name in entry("eurosat").classes.items()}
    keys = list(entry("eurosat").classes)[::-1]
    split_json(root / "split_zhou_EuroSAT.json", root / "2750", made, spelled, keys)
    assert load("eurosat", root).class_names == tuple(entry("eurosat").classes.values())[::-1]
    assert load("eurosat", root / "2750").class_names[0] == "sea or lake"


def test_a_missing_or_broken_split_file_is_said_in_one_line(tmp_path: Path) -> None:
    root = tmp_path / "copy"
    made = make("eurosat", root)
    assert "no split_zhou_EuroSAT.json" in one_line("eurosat", root, split="coop")
    make("aid", tmp_path / "aid")
    assert "CoOp has no split file for aid" in one_line("aid", tmp_path / "aid", split="coop")
    path = root / "split_zhou_EuroSAT.json"
    path.write_text("{}")
    assert "is no split file" in one_line("eurosat", root)
    keys = list(entry("eurosat").classes)
    names = dict(entry("eurosat").classes)

    def broken(**changes: Any) -> str:
        split_json(path, root / "2750", made, names, keys)
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return one_line("eurosat", root)

    row = ["Forest/Forest_1.jpg", 1, "forest"]
    assert "is in train and in test" in broken(train=[row], test=[row])
    assert "label 1 is both" in broken(val=[["Forest/Forest_9.jpg", 1, "River"]])
    assert "without gaps" in broken(train=[], val=[], test=[row])
    assert "outside the data" in broken(val=[["../../secret.jpg", 0, names[keys[0]]]])
    assert "instead of 10" in broken(train=[["Forest/Forest_1.jpg", 0, "Forest"]], val=[], test=[])
