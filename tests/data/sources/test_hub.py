from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from omegaconf import OmegaConf

from fedprompt.config.shipped import configs_dir
from fedprompt.data import catalogue, open_dataset
from fedprompt.data.dataset import TEST, TRAIN, VAL, ImageDataset
from fedprompt.data.sources.hub import HubConfig
from fedprompt.data.sources.parts import integrity as scan
from fedprompt.data.sources.registry import build_data
from fedprompt.errors import UserError
from tests.support.fake_data import colour, encoded, hub_dataset, truncated, write_image_folder

NAMES = ("AnnualCrop", "forest", "SeaLake")
LABELS = [0, 1, 2, 0, 1, 2, 0, 0]


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network and no shared cache, even where another test imported the libraries first."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def load(source: Path | str, tmp_path: Path, seed: int = 1, **config: Any) -> ImageDataset:
    whole = HubConfig(title="fake", hub_id=str(source), **config)
    return open_dataset(whole, seed, cache_dir=tmp_path / "cache")


def shipped(name: str) -> dict[str, Any]:
    raw = OmegaConf.to_container(OmegaConf.load(configs_dir() / "data" / f"{name}.yaml"))
    assert isinstance(raw, dict)
    return {str(key): value for key, value in raw.items()}


def saved(tmp_path: Path, **splits: Any) -> Path:
    path = tmp_path / "saved"
    datasets.DatasetDict(splits).save_to_disk(path)
    return path


def test_splits_labels_and_images_from_disk(tmp_path: Path) -> None:
    path = saved(
        tmp_path,
        train=hub_dataset(LABELS, names=NAMES),
        test=hub_dataset([2, 1, 0], names=NAMES),
    )
    dataset = load(path, tmp_path, test_split="test")
    assert dataset.class_names == ("annual crop", "forest", "sea lake")
    assert dataset.labels_N.tolist() == [*LABELS, 2, 1, 0]
    assert dataset.split_N.tolist() == [TRAIN] * 8 + [TEST] * 3
    assert dataset.open_image(5).getpixel((0, 0)) == colour(2, 5)
    assert dataset.open_image(8).getpixel((0, 0)) == colour(2, 0)
    assert dataset.open_image(8).mode == "RGB"


def test_threads_and_pickles_get_the_right_image(tmp_path: Path) -> None:
    dataset = load(saved(tmp_path, train=hub_dataset(LABELS * 6, names=NAMES)), tmp_path)
    again = pickle.loads(pickle.dumps(dataset))
    with ThreadPoolExecutor(8) as pool:
        pixels = list(pool.map(lambda i: again.open_image(i).getpixel((0, 0)), range(48)))
    assert pixels == [colour(label, i) for i, label in enumerate(LABELS * 6)]


def test_hold_out_where_there_is_no_test_split(tmp_path: Path) -> None:
    path = saved(tmp_path, train=hub_dataset(LABELS, names=NAMES))
    dataset = load(path, tmp_path, test_fraction=0.25)
    tests = np.bincount(dataset.labels_N[dataset.split_N == TEST], minlength=3)
    assert tests.tolist() == [1, 1, 1]


def test_splits_can_be_joined(tmp_path: Path) -> None:
    path = saved(
        tmp_path,
        train=hub_dataset([0, 1], names=NAMES[:2]),
        validation=hub_dataset([1, 0], names=NAMES[:2]),
        test=hub_dataset([0, 1], names=NAMES[:2]),
    )
    dataset = load(path, tmp_path, train_split="train+validation", test_split="test")
    assert np.bincount(dataset.split_N).tolist() == [4, 2]
    dataset = load(path, tmp_path, test_split="test", validation_split="validation")
    assert np.bincount(dataset.split_N).tolist() == [2, 2, 2]
    assert dataset.labels_N[dataset.split_N == VAL].tolist() == [1, 0]
    with pytest.raises(UserError, match="split 'test' is used twice"):
        load(path, tmp_path, test_split="test", validation_split="test")
    with pytest.raises(UserError, match="split 'train' is used twice"):
        load(path, tmp_path, train_split="train", test_split="train")


def test_one_saved_split_parquet_and_image_folder(tmp_path: Path) -> None:
    data = hub_dataset(LABELS, names=NAMES)
    data.save_to_disk(tmp_path / "single")
    one = load(tmp_path / "single", tmp_path)
    (tmp_path / "parquet").mkdir()
    data.to_parquet(tmp_path / "parquet" / "train.parquet")
    two = load(tmp_path / "parquet", tmp_path)
    assert one.labels_N.tolist() == two.labels_N.tolist() == LABELS
    assert one.fingerprint == two.fingerprint  # the content's, whatever the container
    folder = write_image_folder(tmp_path / "images" / "train", {"b": 2, "a": 3}).parent
    three = load(folder, tmp_path)
    assert three.class_names == ("a", "b")
    assert three.open_image(4).getpixel((0, 0)) == colour(0, 1)
    assert np.bincount(three.labels_N).tolist() == [3, 2]


def test_string_labels_and_numbers_with_names(tmp_path: Path) -> None:
    path = saved(tmp_path, train=hub_dataset(["sea_lake", "Forest", "sea_lake", "Forest"]))
    dataset = load(path, tmp_path)
    assert dataset.class_names == ("forest", "sea lake")
    assert dataset.labels_N.tolist() == [1, 0, 1, 0]
    ordered = load(path, tmp_path, class_names=["Sea Lake", "forest"])
    assert ordered.class_names == ("Sea Lake", "forest")
    assert ordered.labels_N.tolist() == [0, 1, 0, 1]
    numbers = tmp_path / "numbers"
    hub_dataset([1, 0, 1, 0]).save_to_disk(numbers)
    assert load(numbers, tmp_path, class_names=["no", "yes"]).labels_N.tolist() == [1, 0, 1, 0]
    with pytest.raises(UserError, match="numbers without names"):
        load(numbers, tmp_path)
    with pytest.raises(UserError, match=r"'Forest' is not in data\.class_names\. Did you mean"):
        load(path, tmp_path, class_names=["sea lake", "forrest"])


def test_domains(tmp_path: Path) -> None:
    train = hub_dataset([0, 1, 0, 1], names=NAMES[:2], city=["Rome", "Oslo", "Oslo", "Rome"])
    dataset = load(saved(tmp_path, train=train), tmp_path, domain_column="city")
    assert dataset.domain_names == ("Oslo", "Rome")
    assert dataset.domains_N.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train_split": "trian"}, "no split 'trian'; there are: train. Did you mean 'train'"),
        ({"test_split": "validation"}, "data.test_split: no split 'validation'"),
        ({"image_column": "img"}, "no column 'img' in split 'train'; there are: image, label"),
        ({"image_column": "label"}, "not images"),
        ({"label_column": "labels"}, "no column 'labels'.*Did you mean 'label'"),
        ({"domain_column": "city"}, "no column 'city'"),
        ({"class_names": ["a", "b"]}, "has 2 names, 'label' has 3 classes: AnnualCrop, forest"),
        ({"class_names": ["a", "b", "A"]}, "lists a class twice"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = saved(tmp_path, train=hub_dataset(LABELS, names=NAMES))
    with pytest.raises(UserError, match=message) as caught:
        load(path, tmp_path, **config)
    assert "\n" not in str(caught.value)


def test_labels_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    numbered = hub_dataset([0, 1, 1, 0], names=["0", "1"])
    path = saved(tmp_path, train=numbered)
    with pytest.raises(UserError, match=r"data\.class_names"):
        load(path, tmp_path)
    assert load(path, tmp_path, class_names=["no", "yes"]).class_names == ("no", "yes")
    hub_dataset([0, -1, 1, 0]).save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(UserError, match="split 'train', row 1 has no label"):
        load(tmp_path / "unlabelled", tmp_path, class_names=["no", "yes"])
    hub_dataset([0, 3, 1, 0]).save_to_disk(tmp_path / "high")
    with pytest.raises(UserError, match="labels run from 0 to 3"):
        load(tmp_path / "high", tmp_path, class_names=["no", "yes"])


def test_splits_that_number_classes_differently_are_refused(tmp_path: Path) -> None:
    path = saved(
        tmp_path,
        train=hub_dataset([0, 1], names=["a", "b"]),
        test=hub_dataset([0, 1], names=["b", "a"]),
    )
    with pytest.raises(UserError, match="'train' and 'test' number their classes differently"):
        load(path, tmp_path, test_split="test")


def test_one_class_is_not_enough(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training images of 1 class\(es\)"):
        load(saved(tmp_path, train=hub_dataset([0, 0, 0], names=NAMES)), tmp_path)


def test_a_bad_image_is_named_or_left_out(tmp_path: Path) -> None:
    rows = [{"bytes": encoded(colour(i % 2, i)), "path": None} for i in range(6)]
    rows[3] = {"bytes": truncated(), "path": None}
    data = datasets.Dataset.from_dict({"image": rows, "label": [0, 1] * 3})
    data = data.cast_column("image", datasets.Image(decode=False))
    data = data.cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    path = saved(tmp_path, train=data)
    with pytest.raises(UserError, match=r"read split 'train', row 3: .*on_bad_image=skip"):
        load(path, tmp_path)
    dataset = load(path, tmp_path, on_bad_image="skip")
    assert dataset.labels_N.tolist() == [0, 1, 0, 0, 1]
    assert [bad.where for bad in dataset.bad_images] == ["split 'train', row 3"]
    assert dataset.open_image(3).getpixel((0, 0)) == colour(0, 4)


def test_unchanged_images_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, train=hub_dataset(LABELS, names=NAMES))
    first = load(path, tmp_path)
    decoded: list[int] = []
    monkeypatch.setattr(scan, "decode", lambda data, pixels: (decoded.append(len(data)), False))
    assert load(path, tmp_path).fingerprint == first.fingerprint
    assert decoded == []


@pytest.mark.parametrize("kind", ["image folder", "paths in parquet"])
def test_images_kept_as_files_are_checked_again_when_they_change(kind: str, tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "images" / "train", {"a": 2, "b": 2}).parent
    file = source / "train" / "a" / "001.png"
    if kind == "paths in parquet":
        paths = sorted(str(path) for path in source.rglob("*.png"))
        rows = [{"bytes": None, "path": path} for path in paths]
        source = tmp_path / "table"
        source.mkdir()
        table = pyarrow.table({"image": rows, "label": ["a", "a", "b", "b"]})
        pyarrow.parquet.write_table(table, source / "train.parquet")
    first = load(source, tmp_path)
    assert first.open_image(1).getpixel((0, 0)) == colour(0, 1)
    file.write_bytes(encoded((9, 9, 9)))
    os.utime(file, (1, 1))
    second = load(source, tmp_path)
    assert second.fingerprint != first.fingerprint
    assert second.open_image(1).getpixel((0, 0)) == (9, 9, 9)


def test_an_unreachable_hub_says_how_to_go_offline(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot load 'nobody/nothing'.*save_to_disk") as caught:
        load("nobody/nothing", tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no folder"):
        load(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot load the data set in"):
        load(tmp_path / "empty", tmp_path)


CARDS = {  # (classes, splits, image column, label column) as the data set cards have them
    "eurosat": (10, ("train", "validation", "test"), "image", "label"),
    "ucmerced": (21, ("train",), "image", "label"),
    "resisc45": (45, ("train", "validation", "test"), "image", "label"),
    "cifar10": (10, ("train", "test"), "img", "label"),
    "cifar100": (100, ("train", "test"), "img", "fine_label"),
}


@pytest.mark.parametrize("name", CARDS)
def test_catalogue_entries_open_data_of_their_card(name: str, tmp_path: Path) -> None:
    classes, splits, image, label = CARDS[name]
    names = list(catalogue.entry(name).classes)
    data = hub_dataset(list(range(classes)) * 2, names=names)
    data = data.rename_columns({k: v for k, v in (("image", image), ("label", label)) if k != v})
    path = saved(tmp_path, **dict.fromkeys(splits, data))
    config = build_data({**catalogue.data_keys(name), "hub_id": str(path)})
    dataset = open_dataset(config, 1, tmp_path / "cache")
    assert dataset.class_names == tuple(catalogue.entry(name).classes.values())
    tests = np.bincount(dataset.labels_N[dataset.split_N == TEST], minlength=classes)
    assert tests.tolist() == [2 if "test" in splits else 1] * classes


def test_catalogued_names_are_in_label_order() -> None:
    merced = "agricultural airplane baseballdiamond beach buildings chaparral denseresidential "
    merced += "forest freeway golfcourse harbor intersection mediumresidential mobilehomepark "
    merced += "overpass parkinglot river runway sparseresidential storagetanks tenniscourt"
    assert list(catalogue.entry("ucmerced").classes) == merced.split()
    eurosat = "annual forest herbaceous highway industrial pasture permanent residential river sea"
    names = catalogue.entry("eurosat").classes.values()
    assert [name.split()[0] for name in names] == eurosat.split()


def test_domains_can_be_numbered_and_chosen(tmp_path: Path) -> None:
    train = hub_dataset([0, 1, 0, 1], names=NAMES[:2], city=[1, 0, 0, 1])
    train = train.cast_column("city", datasets.ClassLabel(names=["Oslo", "New York"]))
    path = saved(tmp_path, train=train)
    dataset = load(path, tmp_path, domain_column="city")
    assert dataset.domain_names == ("New York", "Oslo")
    assert dataset.domains_N.tolist() == [0, 1, 1, 0]
    chosen = load(path, tmp_path, domain_column="city", domains=["oslo"])
    assert chosen.domain_names == ("Oslo",)
    assert chosen.open_image(1).getpixel((0, 0)) == colour(0, 2)
    with pytest.raises(UserError, match=r"no domain 'osla'\. Known: New York, Oslo"):
        load(path, tmp_path, domain_column="city", domains=["osla"])


def test_a_set_for_tests_only(tmp_path: Path) -> None:
    path = saved(tmp_path, test=hub_dataset([0, 1], names=NAMES[:2]))
    dataset = load(path, tmp_path, train_split=None, test_split="test")
    assert dataset.split_N.tolist() == [TEST, TEST]


def test_the_image_folder_config_asks_for_its_root(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="source 'folder' needs 'root'"):
        build_data(shipped("image_folder"))
    root = write_image_folder(tmp_path / "root", {"a": 3, "b": 3})
    config = build_data({**shipped("image_folder"), "root": str(root)})
    assert open_dataset(config, 1, tmp_path / "cache").class_names == ("a", "b")
