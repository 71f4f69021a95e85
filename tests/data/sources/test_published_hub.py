"""Copies of published data sets on the hub: their labels follow the catalogue's order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprompt.data import catalogue, open_dataset
from fedprompt.data.catalogue import entry
from fedprompt.data.dataset import TEST, ImageDataset
from fedprompt.errors import UserError
from fedprompt.experiment.validate import validate
from tests.support.fake_data import hub_dataset

pytestmark = pytest.mark.usefixtures("few_classes")


def saved(tmp_path: Path, **splits: Any) -> str:
    import datasets

    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


def from_hub(name: str, tmp_path: Path, **splits: Any) -> ImageDataset:
    raw = {**catalogue.data_keys(name), "hub_id": saved(tmp_path, **splits)}
    return open_dataset(validate({"data": raw}).data, 1, tmp_path / "cache")


def test_hub_labels_are_matched_to_the_entrys_order(tmp_path: Path) -> None:
    theirs = sorted(map(str, range(1, 103)))  # '1', '10', '100', '101', ...
    data = hub_dataset(list(range(102)), names=theirs)
    dataset = from_hub("flowers102", tmp_path, train=data, test=data)
    assert dataset.class_names == tuple(entry("flowers102").classes.values())
    assert dataset.labels_N[:4].tolist() == [0, 9, 99, 100]


def test_ignored_hub_classes_are_left_out(tmp_path: Path) -> None:
    theirs = sorted(key.lower() for key in entry("caltech101").classes)
    theirs.insert(theirs.index("faces") + 1, "faces_easy")
    data = hub_dataset(list(range(101)) * 2, names=theirs)
    dataset = from_hub("caltech101", tmp_path, train=data)
    assert len(dataset) == 200
    assert dataset.labels_N[theirs.index("faces")] == 0
    assert np.bincount(dataset.labels_N).tolist() == [2] * 100


def test_another_class_on_the_hub_is_refused(tmp_path: Path) -> None:
    names = [*list(entry("rsscn7").classes.values())[:-1], "airport"]
    with pytest.raises(UserError, match="the hub's class 'airport' is not in the catalogue's list"):
        from_hub("rsscn7", tmp_path, train=hub_dataset(list(range(7)), names=names))


def test_hub_domains_and_test_only_sets(tmp_path: Path) -> None:
    pacs = list(entry("pacs").classes)
    domains = ["photo", "art_painting"] * 14
    data = hub_dataset([c % 7 for c in range(28)], names=pacs, domain=domains)
    dataset = from_hub("pacs", tmp_path / "pacs", train=data)
    assert dataset.domain_names == ("art painting", "photo")
    data = hub_dataset(["afghan_hound", "axolotl"] * 2)
    data = data.rename_columns({"label": "class_name"})
    dataset = from_hub("imagenet_r", tmp_path / "r", test=data)
    assert dataset.class_names == ("afghan hound", "axolotl")
    assert dataset.split_N.tolist() == [TEST] * 4
