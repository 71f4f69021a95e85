"""Partition files: what is written comes back, and nothing else is believed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from fedprompt.config.schema import PartitionConfig
from fedprompt.data import catalogue, open_dataset
from fedprompt.data.dataset import HELD, TEST, ImageDataset
from fedprompt.data.partition import Partition, make_partition
from fedprompt.data.partition.file import fingerprint, origin_of, read_partition, write_partition
from fedprompt.errors import UserError
from fedprompt.experiment.compose import compose
from fedprompt.experiment.validate import validate
from tests.cli.test_cli import QUICK, fedprompt
from tests.data.partition.test_partition import settings_of
from tests.support.fake_data import flat_dataset, hub_dataset, write_image_folder
from tests.support.published_copies import make

Change = Callable[[dict[str, Any]], Any]


def named(dataset: ImageDataset) -> ImageDataset:
    return replace(dataset, image_names=tuple(f"a/{i:03d}.jpg" for i in range(len(dataset))))


def holdings(dataset: ImageDataset, partition: Partition) -> dict[str, Any]:
    """The partition by image name."""

    def names(index: np.ndarray) -> list[str]:
        return sorted(dataset.image_names[i] for i in index)

    return {
        "server": names(partition.server_test),
        "train": [names(partition.train(k)) for k in range(partition.num_clients)],
        "test": [names(partition.test(k)) for k in range(partition.num_clients)],
        "unlabelled": sorted(partition.unlabelled),
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(settings_of())
def test_every_partition_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[ImageDataset, PartitionConfig, int],
) -> None:
    dataset, config, seed = case
    dataset, path = named(dataset), tmp_path_factory.mktemp("partition") / "p.json"
    config = replace(config, unlabelled_clients=config.clients // 2)
    made = make_partition(dataset, config, seed)
    write_partition(path, dataset, made, origin_of(config, seed))
    again = make_partition(dataset, replace(config, file=str(path), scheme="iid"), seed + 1)
    for name in ("train_flat", "train_offsets", "test_flat", "test_offsets", "server_test"):
        one, two = getattr(made, name), getattr(again, name)
        assert one.dtype == two.dtype
        assert (one == two).all()
    assert again.unlabelled == made.unlabelled


@pytest.fixture
def dataset() -> ImageDataset:
    return named(flat_dataset([0, 1, 2] * 8, test=[21, 22, 23]))


@pytest.fixture
def stored(dataset: ImageDataset, tmp_path: Path) -> dict[str, Any]:
    config = PartitionConfig(scheme="iid", clients=3)
    write_partition(tmp_path / "p.json", dataset, make_partition(dataset, config, 1), {})
    content = json.loads((tmp_path / "p.json").read_text())
    assert isinstance(content, dict)
    return content


def read(dataset: ImageDataset, content: Any, tmp_path: Path, clients: int = 3) -> Partition:
    path = tmp_path / "changed.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_partition(path, dataset, clients)


def test_the_order_of_images_does_not_matter(
    dataset: ImageDataset, stored: dict[str, Any], tmp_path: Path
) -> None:
    order = np.random.default_rng(0).permutation(len(dataset))
    shuffled = replace(
        dataset,
        labels_N=dataset.labels_N[order],
        split_N=dataset.split_N[order],
        domains_N=dataset.domains_N[order],
        image_names=tuple(dataset.image_names[i] for i in order),
    )
    assert fingerprint(shuffled) == fingerprint(dataset)
    one, two = read(dataset, stored, tmp_path), read(shuffled, stored, tmp_path)
    assert holdings(dataset, one) == holdings(shuffled, two)


def test_fingerprint_is_the_documented_one() -> None:
    dataset = replace(flat_dataset([1, 0, 1]), image_names=("b/ä.jpg", "a.jpg", "b/z.jpg"))
    text = "0\ta.jpg\n1\tb/z.jpg\n1\tb/ä.jpg\n"
    assert fingerprint(dataset) == hashlib.sha256(text.encode()).hexdigest()


def test_a_file_of_another_system_is_read(
    dataset: ImageDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = dataset.image_names
    content = {
        "clients": [
            {"test": [names[3]], "train": [names[9], names[0]]},
            {"train": [names[21]], "test": []},  # an image of the test split
            {"train": [], "test": [names[5]]},
            {"train": [names[6]], "test": [], "labelled": False},
        ],
        "server_test": [names[23], names[1]],
        "dataset": {"fingerprint": fingerprint(dataset)},
        "version": 1,
        "format": "fedprompt partition",
    }
    with caplog.at_level(logging.WARNING):
        partition = read(dataset, content, tmp_path, clients=4)
    assert [partition.train(k).tolist() for k in range(4)] == [[0, 9], [21], [], [6]]
    assert [partition.test(k).tolist() for k in range(4)] == [[3], [], [5], []]
    assert partition.server_test.tolist() == [1, 23]
    assert partition.trainable == [0, 1]
    assert "trains on 1 of the 3 images that flat keeps for tests" in caplog.text


def repeat(source: tuple[Any, ...], target: tuple[Any, ...]) -> Change:
    """A change that adds the first image of one list to another."""

    def change(content: dict[str, Any]) -> None:
        name = reduce(getitem, source, content)[0]
        reduce(getitem, target, content).append(name)

    return change


TRAIN_0, TEST_0 = ("clients", 0, "train"), ("clients", 0, "test")
BROKEN: dict[str, tuple[Change | str, str]] = {
    "twice in a list": (repeat(TRAIN_0, TRAIN_0), "clients[0].train and in clients[0].train"),
    "train and test": (repeat(TRAIN_0, TEST_0), "is in clients[0].train and in clients[0].test"),
    "two clients": (
        repeat(TRAIN_0, ("clients", 1, "train")),
        "is in clients[0].train and in clients[1].train",
    ),
    "two clients' tests": (
        repeat(TEST_0, ("clients", 2, "test")),
        "is in clients[0].test and in clients[2].test",
    ),
    "server and client": (
        repeat(("server_test",), ("clients", 2, "train")),
        "is in server_test and in clients[2].train",
    ),
    "unknown image": (
        lambda c: c["clients"][1]["test"].append("a/999.jpg"),
        "clients[1].test: no image 'a/999.jpg' in flat",
    ),
    "another data set": (
        lambda c: c["dataset"].update(fingerprint="0" * 64, name="eurosat", images=27000),
        "was made for eurosat (27000 images); names or labels of the 24 images of flat differ",
    ),
    "fewer clients": (lambda c: c["clients"].pop(), "is for 2 clients; set partition.clients=2"),
    "version": (lambda c: c.update(version=2), "has version 2"),
    "format": (lambda c: c.update(format="other"), "is no partition file"),
    "no clients": (lambda c: c.pop("clients"), "'clients' must be a list"),
    "no test": (lambda c: c["clients"][0].pop("test"), "clients[0] must hold 'train' and 'test'"),
    "numbers": (lambda c: c["clients"][1].update(train=[1]), "clients[1]: 'train' must"),
    "unknown key": (lambda c: c.update(seed=1), "unknown key 'seed'"),
    "typo": (lambda c: c["clients"][0].update(labeled=False), "beside them only 'validation'"),
    "labelled": (lambda c: c["clients"][0].update(labelled=0), "must be true or false"),
    "no fingerprint": (lambda c: c.update(dataset={}), "'dataset' must hold a 'fingerprint'"),
    "a list": ("[]", "is no partition file"),
    "not JSON": ('{"format": ', "is not JSON"),
    "not text": ("\x00", "is not JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_file_is_refused_with_one_line(
    name: str, dataset: ImageDataset, stored: dict[str, Any], tmp_path: Path
) -> None:
    read(dataset, stored, tmp_path)  # as written, it is fine
    change, message = BROKEN[name]
    if isinstance(change, str):
        content: Any = change
    else:
        content = stored
        change(content)
    with pytest.raises(UserError) as caught:
        read(dataset, content, tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file_no_names_and_held_out_images(
    dataset: ImageDataset, stored: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none\.json: No such file"):
        read_partition(tmp_path / "none.json", dataset, 3)
    with pytest.raises(UserError, match="have no names"):
        read(replace(dataset, image_names=()), stored, tmp_path)
    partition = make_partition(dataset, PartitionConfig(scheme="iid", clients=3), 1)
    with pytest.raises(UserError, match="cannot write"):
        write_partition(tmp_path / "no" / "p.json", dataset, partition, {})
    split_N = np.where(dataset.split_N == TEST, HELD, dataset.split_N).astype(np.int8)
    with pytest.raises(UserError, match=r"server_test: 'a/02\d.jpg' is held out by a protocol"):
        read(replace(dataset, split_N=split_N), stored, tmp_path)


def test_relabelled_or_renamed_images_are_another_data_set(dataset: ImageDataset) -> None:
    labels_N = dataset.labels_N.copy()
    labels_N[0] = 1
    assert fingerprint(replace(dataset, labels_N=labels_N)) != fingerprint(dataset)
    names = ("b.jpg", *dataset.image_names[1:])
    assert fingerprint(replace(dataset, image_names=names)) != fingerprint(dataset)


def test_a_copy_elsewhere_and_another_hold_out_are_the_same_data_set(tmp_path: Path) -> None:
    sets = []
    for place, seed in (("here", 1), ("there", 2)):
        root = write_image_folder(tmp_path / place / "images", {"farm": 12, "river": 12})
        config = validate({"data": {"source": "folder", "root": str(root)}}).data
        sets.append(open_dataset(config, seed, tmp_path / "cache"))
    here, there = sets
    assert fingerprint(here) == fingerprint(there)
    assert (here.split_N != there.split_N).any()
    config = PartitionConfig(scheme="iid", clients=2)
    path, made = tmp_path / "p.json", make_partition(here, config, 1)
    write_partition(path, here, made, {})
    assert str(tmp_path) not in path.read_text()
    again = make_partition(there, replace(config, file=str(path)), 2)
    assert holdings(here, made) == holdings(there, again)  # the file says what the server tests


def test_images_have_documented_names(tmp_path: Path) -> None:
    scenes = open_dataset(compose("label_skew", ["data.images_per_class=2"]).data, 1)
    assert scenes.image_names[:3] == (
        "savanna/baseball diamond/0",
        "savanna/baseball diamond/1",
        "savanna/beach/0",
    )
    for name, own, label, domain in zip(
        scenes.image_names, range(len(scenes)), scenes.labels_N, scenes.domains_N, strict=True
    ):
        assert name.split("/") == [
            scenes.domain_names[domain], scenes.class_names[label], str(own % 2),
        ]  # fmt: skip
    hub_dataset(["a", "b"] * 4, names=["a", "b"]).save_to_disk(str(tmp_path / "hub"))
    keys = {"source": "hub", "hub_id": str(tmp_path / "hub")}
    rows = open_dataset(validate({"data": keys}).data, 1, tmp_path / "cache")
    assert rows.image_names == tuple(f"train/{row}" for row in range(8))
    make("cifar100", tmp_path / "cifar")
    keys = {**catalogue.data_keys("cifar100"), "root": str(tmp_path / "cifar")}
    records = open_dataset(validate({"data": keys}).data, 1, tmp_path / "cache")
    assert (records.image_names[0], records.image_names[-1]) == ("train.bin/0", "test.bin/199")
    for dataset in (scenes, rows, records):
        assert len(set(dataset.image_names)) == len(dataset)


def test_a_file_written_by_us_reproduces_the_run_bitwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = [*QUICK, "output.report=false", "evaluation.local_only=false"]
    path = tmp_path / "quick.json"
    status, out, err = fedprompt(
        monkeypatch, capsys, "data", "partition", "label_skew", *quick, "--out", path
    )
    assert (status, err) == (0, "")
    assert out == f"wrote {path}\n"
    assert json.loads(path.read_text())["origin"]["partition"]["alpha"] == 1.0
    # Another scheme, so that only the file can explain the same results.
    by_file = [f"partition.file='{path}'", "partition.scheme=iid", "partition.alpha=7"]
    folders = []
    for name, keys in (("dealt", []), ("read", by_file), ("other", ["partition.scheme=iid"])):
        folders.append(tmp_path / name)
        status, _, err = fedprompt(
            monkeypatch, capsys, "run", "label_skew", *quick, *keys, f"output.dir='{folders[-1]}'"
        )
        assert status == 0, err
    for file in ("metrics.jsonl", "prompts.safetensors", "partition.json"):
        dealt, again, other = ((folder / file).read_bytes() for folder in folders)
        assert dealt == again, file
        assert dealt != other, f"{file} would not show a difference"
    assert compose(folders[1] / "config.yaml").partition.file == str(path)
