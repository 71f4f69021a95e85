"""One image folder per client: what a node has alone is what a simulation has of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedprompt.config.schema import Config
from fedprompt.data.dataset import TEST, TRAIN, ImageDataset
from fedprompt.data.features.table import open_feature_table
from fedprompt.data.partition import Partition, make_partition
from fedprompt.data.sources.client_folders import ClientFolders, ClientFoldersConfig
from fedprompt.errors import UserError
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import run
from fedprompt.experiment.validate import validate
from tests.support.builders import small_config
from tests.support.fake_data import FakeClip, truncated, write_image_folder

CLASSES = ("river", "Sea Ice", "harbor")
COUNTS = (
    {"river": 9, "sea_ice": 5, "harbor": 7},
    {"river": 4, "harbor": 8},
    {"SeaIce": 6, "harbor": 3},
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for k, counts in enumerate(COUNTS):
        write_image_folder(tmp_path / f"client-{k}", counts, first=10 * k)
    write_image_folder(tmp_path / "server", {"river": 3, "sea_ice": 2, "harbor": 1}, first=40)
    return tmp_path


def config_for(images: Path, **data: Any) -> Config:
    folders = [str(images / f"client-{k}") for k in range(3)]
    whole = {"source": "client_folders", "class_names": list(CLASSES), "folders": folders}
    whole |= {"root": str(images / "server"), **data}
    return small_config(data=whole, partition={"clients": 3})


def opened(config: Config, root: Path) -> tuple[ImageDataset, Partition]:
    dataset = ClientFolders.load(config.data, config.seed, root / "cache")
    return dataset, make_partition(dataset, config.partition, config.seed)


def alone(config: Config, client: int) -> Config:
    folders = [f if k == client else "" for k, f in enumerate(config.data.folders)]
    return replace(config, data=replace(config.data, folders=folders, root=None))


def refused(call: Any) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_labels_follow_the_experiments_list(root: Path) -> None:
    dataset, _ = opened(config_for(root), root)
    assert dataset.class_names == CLASSES
    counts = {k: np.bincount(dataset.labels_N[dataset.owners_N == k], minlength=3).tolist()
              for k in (-1, 0, 1, 2)}  # fmt: skip
    assert counts == {-1: [3, 2, 1], 0: [9, 5, 7], 1: [4, 0, 8], 2: [0, 6, 3]}
    assert set(dataset.split_N[dataset.owners_N == -1]) == {TEST}
    assert set(dataset.split_N[dataset.owners_N >= 0]) == {TRAIN}
    assert dataset.image_names[0] == "client-0/harbor/000.png"
    assert len(set(dataset.image_names)) == len(dataset)
    first = dataset.image_names.index("client-2/SeaIce/020.png")
    own = Image.open(root / "client-2" / "SeaIce" / "020.png").convert("RGB")
    assert dataset.open_image(first).tobytes() == own.tobytes()


def test_every_client_holds_its_own_folder(root: Path) -> None:
    dataset, partition = opened(config_for(root), root)
    for k, counts in enumerate(COUNTS):
        train, test = partition.train(k), partition.test(k)
        held = np.sort(np.concatenate([train, test]))
        assert held.tolist() == np.flatnonzero(dataset.owners_N == k).tolist()
        assert len(test) == round(0.25 * sum(counts.values()))
    assert (dataset.owners_N[partition.server_test] == -1).all()
    assert partition.trainable == [0, 1, 2]


@pytest.mark.parametrize("client", range(3))
def test_a_node_alone_has_what_the_simulation_has_of_it(root: Path, client: int) -> None:
    config = config_for(root)
    whole, dealt = opened(config, root)
    own, mine = opened(alone(config, client), root)
    for part in ("train", "test"):
        a, b = getattr(dealt, part)(client), getattr(mine, part)(client)
        assert [whole.image_names[i] for i in a] == [own.image_names[i] for i in b]
        assert whole.labels_N[a].tolist() == own.labels_N[b].tolist()
    others = [k for k in range(3) if k != client]
    assert all(len(mine.train(k)) + len(mine.test(k)) == 0 for k in others)
    assert len(mine.server_test) == 0
    assert whole.domain_names == own.domain_names == ("client 0", "client 1", "client 2", "server")


def test_the_split_depends_on_seed_and_client(root: Path) -> None:
    config = config_for(root)
    tests = [opened(replace(config, seed=s), root)[1].test(0).tolist() for s in range(4)]
    assert len({str(t) for t in tests}) > 1


def test_features_are_cached_folder_by_folder(root: Path) -> None:
    """Batches never mix folders: a node's features have the simulation's last bits."""
    clip: Any = FakeClip()
    dataset, _ = opened(config_for(root), root)
    columns = open_feature_table(clip, dataset, root / "cache", {"features"}, progress=False)
    assert clip.batches == [3] * 7 + [3] * 4 + [3] * 3 + [3] * 2
    files = list((root / "cache" / "features").rglob("*.rows"))
    assert len(files) == 4
    for client in range(3):
        own, _ = opened(alone(config_for(root), client), root)
        mine = open_feature_table(clip, own, root / "cache", {"features"}, progress=False)
        rows = np.flatnonzero(dataset.owners_N == client)[::-1]
        theirs = columns.rows(rows).features
        assert theirs.equal(mine.rows(np.arange(len(own))[::-1].copy()).features)
    assert sum(clip.batches) == len(dataset), "nothing was encoded twice"


def test_views_are_those_of_the_folder_alone(root: Path) -> None:
    clip: Any = FakeClip()
    dataset, _ = opened(config_for(root), root)
    options: Any = {"view": 1, "crop_scale": 0.3, "progress": False}
    whole = open_feature_table(clip, dataset, root / "cache", {"features"}, **options)
    own, _ = opened(alone(config_for(root), 2), root)
    mine = open_feature_table(clip, own, root / "elsewhere", {"features"}, **options)
    rows = np.flatnonzero(dataset.owners_N == 2)
    assert whole.rows(rows).features.equal(mine.rows(np.arange(len(own))).features)


def test_a_server_without_images(root: Path) -> None:
    config = config_for(root, folders=["", "", ""], root=None)
    dataset, partition = opened(config, root)
    assert len(dataset) == 0
    assert partition.num_clients == 3
    clip: Any = FakeClip()
    columns = open_feature_table(clip, dataset, root / "cache", {"features"}, progress=False)
    assert columns.rows(np.zeros(0, dtype=np.int64)).features.shape == (0, 4)


def test_what_is_wrong_with_a_folder_is_one_line(root: Path) -> None:
    config = config_for(root)
    write_image_folder(root / "client-1", {"glacier": 2, "rivers": 1})
    line = refused(lambda: opened(config, root))
    assert "client-1" in line
    assert "class 'glacier' (and 1 more) that is not in data.class_names" in line
    gone = config_for(root, folders=["", "", ""], root=str(root / "gone"))
    assert "server: " in (line := refused(lambda: opened(gone, root)))
    assert "does not exist" in line
    (root / "empty" / "river").mkdir(parents=True)
    folders = [str(root / "empty"), "", ""]
    assert "no readable image" in refused(lambda: opened(config_for(root, folders=folders), root))
    write_image_folder(root / "twice", {"river": 1, "River": 1})
    folders = [str(root / "twice"), "", ""]
    assert "same class" in refused(lambda: opened(config_for(root, folders=folders), root))


def test_bad_images_are_refused_or_counted(root: Path) -> None:
    (root / "client-0" / "river" / "bad.jpg").write_bytes(truncated())
    line = refused(lambda: opened(config_for(root), root))
    assert "cannot read" in line
    assert "river/bad.jpg" in line
    dataset, partition = opened(config_for(root, on_bad_image="skip"), root)
    assert len(dataset.bad_images) == 1
    assert len(partition.train(0)) + len(partition.test(0)) == 21


def test_too_few_images(root: Path) -> None:
    config = config_for(root)
    config = replace(config, partition=replace(config.partition, min_images=10))
    assert "client 2 holds 9 images" in refused(lambda: opened(config, root))


def raw(**changes: Any) -> dict[str, Any]:
    data = {"source": "client_folders", "class_names": ["a", "b"], "folders": ["x", "y"]}
    return {"data": data | changes.pop("data", {}), "partition": {"clients": 2} | changes}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"clients": 3}, "data.folders has 2 folders for partition.clients=3"),
        ({"file": "p.json"}, "partition.file"),
        ({"data": {"class_names": ["a"]}}, "needs 'class_names', at least two"),
        ({"data": {"class_names": ["sea ice", "Sea_Ice"]}}, "lists a class twice"),
    ],
)
def test_configs_that_cannot_be(changes: dict[str, Any], line: str) -> None:
    assert line in refused(partial(validate, raw(**changes)))


def test_folders_may_be_elsewhere() -> None:
    assert validate(raw(data={"folders": []})).data.folders == []
    assert isinstance(validate(raw()).data, ClientFoldersConfig)


def test_a_simulation_needs_all_folders(root: Path, tmp_path: Path) -> None:
    for folders in ([], ["", str(root / "client-1"), ""]):
        config = config_for(root, folders=folders)
        config = replace(config, output=replace(config.output, dir=str(tmp_path / "run")))
        assert "data.folders must name" in refused(lambda c=config: run(c, QuietDisplay()))
        assert not (tmp_path / "run" / "config.yaml").exists(), "nothing is left behind"
