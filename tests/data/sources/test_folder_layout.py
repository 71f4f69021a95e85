"""What a folder is taken for: classes, splits, or something else that must not become classes."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedprompt.data.dataset import TEST, ImageDataset
from fedprompt.data.images import name_key
from fedprompt.data.sources.folder import Folder, FolderConfig
from fedprompt.data.sources.parts.folder_layout import split_of
from fedprompt.errors import UserError
from tests.support.fake_data import write_image_folder


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def load(root: Path, **config: object) -> ImageDataset:
    return Folder.load(FolderConfig(root=str(root), **config), 1, root.parent / "cache")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Test"),
        ("training", "testing"),
        ("TRAIN", "TEST"),
        ("train_set", "Test-Set"),
        ("train2017", "test2017"),
        ("Training Images", "Test Images"),
        ("01_train", "02_test"),
        ("split-train", "split-test"),
        ("images_train", "images_test"),
        ("train.", "test (1)"),
        ("train_v2", "test_v2"),
        ("trn", "tst"),
    ],
)
def test_usual_names_of_splits_are_splits(train: str, test: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_image_folder(root / train, {"cat": 3, "dog": 3})
    write_image_folder(root / test, {"Cat": 1, "dog": 2}, first=7)
    write_image_folder(root / "Validation", {"cat": 2, "dog": 2}, first=20)
    dataset = load(root)
    assert dataset.class_names == ("cat", "dog")
    assert np.bincount(dataset.labels_N[dataset.split_N == TEST]).tolist() == [1, 2]
    (note,) = dataset.notes
    assert "2 classes (cat, dog), 9 images, 6 for training and 3 for testing" in note
    assert "Validation/ with 4 images" in note


def test_names_of_splits() -> None:
    assert all(split_of(name) is None for name in ("trainer", "tester", "bus", "value", "12", ""))


REFUSED: dict[str, tuple[dict[str, int], str]] = {
    "splits without class folders": ({"Train": 3, "Test": 3}, "no class folders"),
    "one level too high": ({"set/train/a": 1, "set/train/b": 1, "set/test/a": 1}, "Set data"),
    "two data sets side by side": ({"one/a": 2, "one/b": 2, "two/a": 2, "two/c": 2}, "root/one"),
    "splits below classes": ({"a/train": 2, "a/test": 2, "b/train": 2, "b/test": 2}, "root/a"),
    "images and labels": ({"images/train": 2, "images/val": 2, "labels": 0}, "root/images"),
    "a test split beside classes": ({"a": 2, "b": 2, "test/a": 2, "test/b": 1}, "beside it 'a'"),
    "two training splits": ({"train/a": 2, "Training/a": 2, "train/b": 2}, "both names"),
    "data sets, one with a preview": (
        {"one": 1, "one/a": 2, "one/b": 2, "two/a": 2, "two/b": 2},
        "the same folders: 'a', 'b'",
    ),
    "unusual names of splits": (
        {"fit/a": 2, "fit/b": 2, "probe/a": 2, "probe/b": 2},
        "call them train and test",
    ),
    "images in splits, beside others": ({"train": 3, "test": 2, "boxes": 0}, "'boxes'"),
    "numbered splits below classes": ({"a/1_train": 2, "a/2_test": 2, "b": 2}, "root/a"),
    "too high, inside a split": ({"train/x/a": 2, "train/y/a": 2, "test/x/a": 1}, "train/x"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_splits_and_data_sets_do_not_become_classes(case: str, tmp_path: Path) -> None:
    counts, words = REFUSED[case]
    root = write_image_folder(tmp_path / "root", counts)
    line = refused(lambda: load(root))
    assert str(root) in line
    assert words in line


def test_classes_may_be_deep_or_called_like_splits_where_that_is_clear(tmp_path: Path) -> None:
    deep = write_image_folder(tmp_path / "deep", {"one/x": 2, "two/y": 2})
    assert "data.class_names" in refused(lambda: load(deep))
    assert len(load(deep, class_names=["one", "two"])) == 4
    vehicles = write_image_folder(tmp_path / "vehicles", {"bus": 2, "train": 2})
    assert load(vehicles).class_names == ("bus", "train")
    drives = write_image_folder(tmp_path / "drives", {"bus": 2, "test": 2, "train": 2})
    assert "data.class_names" in refused(lambda: load(drives))
    assert len(load(drives, class_names=["bus", "test", "train"]).class_names) == 3


@pytest.mark.parametrize("name", ["@eaDir", "lost+found", "$RECYCLE.BIN", "__MACOSX"])
def test_folders_of_the_system_are_no_classes(name: str, tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "root", {"cat": 2, "dog": 2, name: 2})
    assert load(root).class_names == ("cat", "dog")
    (root / "cat" / name).mkdir()
    assert len(load(root)) == 4


@pytest.mark.parametrize("name", [b"caf\xe9", b"cat/\xe9.png"])
def test_a_name_that_is_not_utf_8_is_named(name: bytes, tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "root", {"cat": 2, "dog": 2})
    try:
        os.mkdir(os.fsencode(root) + b"/" + name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    line = refused(lambda: load(root))
    assert r"\xe9" in line
    assert "UTF-8" in line


def test_a_link_is_named_that_makes_a_class_of_another_or_a_circle(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "root", {"cat": 2, "dog": 2})
    (root / "puppy").symlink_to(root / "dog")
    line = refused(lambda: load(root))
    assert str(root / "dog") in line
    assert str(root / "puppy") in line
    (root / "puppy").unlink()
    (root / "cat" / "up").symlink_to(root)
    assert str(root / "cat" / "up ") in refused(lambda: load(root))
    leak = write_image_folder(tmp_path / "leak", {"train/a": 2, "train/b": 2})
    (leak / "test").symlink_to("train")
    line = refused(lambda: load(leak))
    assert str(leak / "train" / "a") in line
    assert str(leak / "test" / "a") in line


def test_every_format_of_pillow_is_read_and_the_rest_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_image_folder(tmp_path / "root", {"a": 1, "b": 1})
    image = Image.new("RGB", (8, 8), (9, 200, 30))
    for suffix, kind in {
        "gif": "GIF", "jfif": "JPEG", "jp2": "JPEG2000", "webp": "WEBP", "ppm": "PPM", "tga": "TGA"
    }.items():  # fmt: skip
        image.save(root / "a" / f"x.{suffix}", kind)
    for name in ("1.heic", "2.HEIC", "notes.txt", "README"):
        (root / "b" / name).write_bytes(b"x")
    image.save(root / "loose.png")
    dataset = load(root)
    assert np.bincount(dataset.labels_N).tolist() == [7, 1]
    (note,) = dataset.notes
    for words in ("2 .heic", "1 .txt", "1 without a suffix", "1 images beside"):
        assert words in note
    assert "2 .heic" in caplog.text
    assert ".txt" not in caplog.text


def test_links_are_followed_and_dangling_ones_refused(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "root", {"a": 1, "b": 1})
    elsewhere = write_image_folder(tmp_path / "elsewhere", {"more": 3, "c": 2})
    (root / "a" / "linked").symlink_to(elsewhere / "more")
    (root / "c").symlink_to(elsewhere / "c")
    assert np.bincount(load(root).labels_N).tolist() == [4, 1, 2]
    for place in (root / "d", root / "b" / "gone", root / "b" / "gone.png"):
        place.symlink_to(tmp_path / "nowhere")
        line = refused(lambda: load(root))
        assert str(place) in line
        assert "nowhere" in line
        place.unlink()
    (root / "b" / "up").symlink_to(root / "b")
    assert "b/up" in refused(lambda: load(root))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "root", {"a": 2, "b": 2})
    os.mkfifo(root / "a" / "pipe.png")
    line = refused(lambda: load(root))
    assert "pipe.png" in line
    assert "not a regular file" in line
    assert len(load(root, on_bad_image="skip").bad_images) == 1


def test_names_match_in_every_unicode_form(tmp_path: Path) -> None:
    composed = "caf\u00e9"
    root = write_image_folder(
        tmp_path / "root", {unicodedata.normalize("NFD", composed): 2, "b\uff41r": 2}
    )
    dataset = load(root, class_names=["bar", composed])
    assert dataset.class_names == ("bar", composed)
    assert load(root).class_names[1] == composed
    write_image_folder(root, {composed: 1})
    if len(list(root.iterdir())) == 3:  # some file systems store both names as one
        with pytest.raises(UserError, match="are the same class name"):
            load(root)
    assert name_key("men\u2019s \ufb01sh\u200b") == name_key("Men's fish")
