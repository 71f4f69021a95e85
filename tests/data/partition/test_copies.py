"""The same file in training and test images, or in two classes, is said with counts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fedprompt.config.schema import DataConfig, PartitionConfig
from fedprompt.data import open_dataset
from fedprompt.data.partition import make_partition
from fedprompt.data.partition.copies import warn_of_copies
from fedprompt.data.sources.client_folders import ClientFoldersConfig
from fedprompt.data.sources.folder import FolderConfig
from tests.support.fake_data import write_image_folder
from tests.support.refusals import refused

CLASSES = ["a", "b"]


def warn(config: DataConfig, cache: Path, **partition: Any) -> None:
    dataset = open_dataset(config, 1, cache)
    options = {"clients": 1, "scheme": "iid", **partition}
    warn_of_copies(dataset, make_partition(dataset, PartitionConfig(**options), 1))


def test_copies_between_the_splits_of_a_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_image_folder(tmp_path / "root" / "train", {"a": 4, "b": 4})
    write_image_folder(tmp_path / "root" / "test", {"a": 2, "b": 2}, first=9)
    config = FolderConfig(title="mine", root=str(tmp_path / "root"))
    warn(config, tmp_path / "cache", local_test_fraction=0)
    assert not caplog.text
    for number in (0, 1):
        shutil.copy(
            tmp_path / f"root/train/b/00{number}.png", tmp_path / f"root/test/b/9{number}.png"
        )
    warn(config, tmp_path / "cache", local_test_fraction=0)
    assert "mine: 2 of 6 of the server's test images are copies" in caplog.text
    assert "test/b/90.png" in caplog.text


def test_copies_within_a_client_and_between_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_image_folder(tmp_path / "one", {"a": 1, "b": 1})
    for copy in range(1, 20):
        shutil.copy(root / "a" / "000.png", root / "a" / f"{copy:03d}.png")
        shutil.copy(root / "b" / "000.png", root / "b" / f"{copy:03d}.png")
    config = ClientFoldersConfig(class_names=CLASSES, folders=[str(root)])
    warn(config, tmp_path / "cache")
    assert "10 of 10 of the clients' test images are copies" in caplog.text
    assert "another class" not in caplog.text
    shutil.copy(root / "a" / "000.png", root / "b" / "000.png")
    warn(config, tmp_path / "cache")
    assert "1 images are also in another class, e.g. client-0/b/000.png" in caplog.text


def test_a_folder_in_two_hands_is_refused(tmp_path: Path) -> None:
    one, two = (write_image_folder(tmp_path / n, {"a": 2, "b": 2}) for n in ("one", "two"))
    (tmp_path / "link").symlink_to(one)
    for options, words in [
        ({"folders": [one, two, tmp_path / "link"]}, ("client 0", "client 2")),
        ({"folders": [one, two], "root": f"{two}/../two"}, ("client 1", "data.root")),
    ]:
        plain = {
            key: list(map(str, value)) if isinstance(value, list) else str(value)
            for key, value in options.items()
        }
        config = ClientFoldersConfig(class_names=CLASSES, **plain)  # type: ignore[arg-type]
        line = refused(lambda config=config: open_dataset(config, 1, tmp_path / "cache"))
        assert all(word in line for word in words)
    apart = ClientFoldersConfig(class_names=CLASSES, folders=[str(one), ""], root=str(two))
    assert len(open_dataset(apart, 1, tmp_path / "cache")) == 8
