from __future__ import annotations

import io
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedprompt.data import open_dataset
from fedprompt.data.dataset import TEST, TRAIN, VAL, ImageDataset
from fedprompt.data.images import decode_rgb, hold_out_test, readable_name
from fedprompt.data.sources.folder import FolderConfig
from fedprompt.errors import UserError
from tests.support.fake_data import colour, encoded, truncated, write_image_folder


def load(root: Path, seed: int = 1, **config: Any) -> ImageDataset:
    whole = FolderConfig(title="fake", root=str(root), **config)
    return open_dataset(whole, seed, cache_dir=root.parent / "cache")


def test_classes_labels_and_images(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "root", {"AnnualCrop": 4, "sea_lake": 6})
    dataset = load(root)
    assert dataset.class_names == ("annual crop", "sea lake")
    assert dataset.labels_N.tolist() == [0] * 4 + [1] * 6
    assert dataset.domain_names == ("fake",)
    for index in range(10):
        image = dataset.open_image(index)
        number = index if index < 4 else index - 4
        assert image.mode == "RGB"
        assert image.getpixel((3, 3)) == colour(int(dataset.labels_N[index]), number)
    assert len(dataset) == 10
    assert dataset.bad_images == ()


def test_a_data_set_survives_pickling(tmp_path: Path) -> None:
    dataset = load(write_image_folder(tmp_path / "root", {"a": 2, "b": 2}))
    again = pickle.loads(pickle.dumps(dataset))
    assert again.open_image(3).getpixel((0, 0)) == colour(1, 1)


def test_hold_out_is_seeded_and_stratified(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "root", {"a": 20, "b": 8, "c": 2, "d": 1})
    dataset = load(root, test_fraction=0.25)
    tests = np.bincount(dataset.labels_N[dataset.split_N == TEST], minlength=4)
    assert tests.tolist() == [5, 2, 1, 0]
    assert (load(root).split_N == dataset.split_N).all()
    assert (load(root, seed=2).split_N != dataset.split_N).any()
    assert load(root, seed=2).fingerprint == dataset.fingerprint


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_hold_out_keeps_a_training_and_a_test_image(fraction: float) -> None:
    labels_N = np.array([0] * 50 + [1] * 3 + [2] * 2 + [3])
    split_N = hold_out_test(labels_N, fraction, 1)
    train_C = np.bincount(labels_N[split_N == TRAIN], minlength=4)
    test_C = np.bincount(labels_N[split_N == TEST], minlength=4)
    assert train_C.min() >= 1
    assert test_C[:3].min() >= 1
    assert test_C[3] == 0


def test_official_split_and_unused_val(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_image_folder(root / "train", {"a": 3, "b": 4})
    write_image_folder(root / "test", {"a": 2, "b": 1}, first=10)
    write_image_folder(root / "val", {"a": 9, "b": 9}, first=20)
    dataset = load(root)
    assert np.bincount(dataset.split_N).tolist() == [7, 3]
    assert np.bincount(dataset.labels_N[dataset.split_N == TEST]).tolist() == [2, 1]


def test_a_val_folder_is_the_servers_if_asked(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "train", {"a": 3, "b": 3})
    write_image_folder(tmp_path / "val", {"a": 1, "b": 2}, first=50)
    with pytest.raises(UserError, match="no test/"):
        load(tmp_path, validation="server")
    write_image_folder(tmp_path / "test", {"a": 2, "b": 2}, first=80)
    plain, dataset = load(tmp_path), load(tmp_path, validation="server")
    assert np.bincount(dataset.split_N).tolist() == [6, 4, 3]
    assert dataset.labels_N[dataset.split_N == VAL].tolist() == [0, 1, 1]
    assert dataset.split_N[dataset.split_N != VAL].tolist() == plain.split_N.tolist()
    assert "3 for validation" in dataset.notes[0]
    write_image_folder(tmp_path / "val", {"c": 1}, first=99)
    with pytest.raises(UserError, match="val has 'c'"):
        load(tmp_path, validation="server")
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(UserError, match="no val/"):
        load(tmp_path, validation="server")


def test_train_without_test_is_held_out_and_a_class_may_be_called_train(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "one" / "train", {"a": 8, "b": 8})
    assert (load(tmp_path / "one").split_N == TEST).sum() == 4
    assert load(write_image_folder(tmp_path / "two", {"bus": 3, "train": 3})).class_names == (
        "bus",
        "train",
    )


def test_nested_hidden_and_other_files(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "root", {"a": 2, "b/deep/er": 2, ".git": 3})
    write_image_folder(root, {"a": 2}, suffix="jpg", first=5)
    (root / "a" / "Thumbs.db").write_bytes(b"not an image")
    (root / "a" / "._000.png").write_bytes(b"not an image either")
    (root / "readme.txt").write_text("hello")
    (root / "a" / "UPPER.PNG").write_bytes(encoded((1, 2, 3)))
    dataset = load(root)
    assert dataset.class_names == ("a", "b")
    assert np.bincount(dataset.labels_N).tolist() == [5, 2]


def test_class_names_set_order_and_spelling(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "root", {"SeaLake": 2, "dense_residential": 2})
    dataset = load(root, class_names=["Dense-Residential", "sea lake"])
    assert dataset.class_names == ("Dense-Residential", "sea lake")
    first = dataset.open_image(int(np.flatnonzero(dataset.labels_N == 1)[0]))
    assert first.getpixel((0, 0)) == colour(0, 0)  # SeaLake was written first, and is label 1


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("DenseResidential", "dense residential"),
        ("AnnualCrop", "annual crop"),
        ("dense_residential", "dense residential"),
        ("sea-ice  floe", "sea ice floe"),
        ("forest", "forest"),
        ("UCMercedPark2Lot", "uc merced park2 lot"),
    ],
)
def test_readable_names(folder: str, name: str) -> None:
    assert readable_name(folder) == name


@pytest.mark.parametrize(
    ("counts", "config", "message"),
    [
        ({}, {}, "no images found"),
        ({"a": 0, "b": 0}, {}, "no images found"),
        ({"a": 3}, {}, "one class folder, 'a'"),
        ({"a": 3, "b": 0}, {}, "class folder 'b' .* no readable training image"),
        ({"a": 3, "b": 3}, {"class_names": ["a", "c"]}, "no folder for class 'c'"),
        ({"a": 3, "b": 3, "c": 1}, {"class_names": ["a", "b"]}, "has 'c', not listed"),
        ({"a": 3, "b": 3}, {"class_names": ["a", "b", "A"]}, "lists a class twice"),
        ({"sea_ice": 3, "SeaIce": 3}, {}, "are the same class name"),
        ({"train/a": 3, "train/b": 3, "other": 1}, {}, "has train/ and beside it 'other'"),
        ({"test/a": 3, "test/b": 3}, {}, "no train/"),
        ({"train/a": 1, "train/b": 1, "test/c": 1}, {}, "test has 'c'"),
        ({"train/a": 1, "train/b": 1, "test/a": 0}, {}, "test contains no images"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    counts: dict[str, int], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    write_image_folder(root, counts)
    with pytest.raises(UserError, match=message) as caught:
        load(root, **config)
    assert "\n" not in str(caught.value)


def test_a_missing_root_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist; set data\.root"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"):
        load(tmp_path / "file")


def test_a_bad_image_is_named_or_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_image_folder(tmp_path / "root", {"a": 4, "b": 4})
    whole = load(root)
    (root / "a" / "001.png").write_bytes(truncated())
    (root / "b" / "003.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"a/001\.png and 1 more: .*on_bad_image=skip") as caught:
        load(root)
    assert "\n" not in str(caught.value)
    dataset = load(root, on_bad_image="skip")
    assert dataset.labels_N.tolist() == [0] * 3 + [1] * 3
    assert [Path(bad.where).name for bad in dataset.bad_images] == ["001.png", "003.png"]
    assert all(bad.reason for bad in dataset.bad_images)
    assert dataset.open_image(1).getpixel((0, 0)) == colour(0, 2)
    assert dataset.fingerprint != whole.fingerprint
    assert "2 of 8 images skipped" in caplog.text
    for number in range(4):
        (root / "a" / f"{number:03d}.png").write_bytes(truncated())
    with pytest.raises(UserError, match="class folder 'a'"):
        load(root, on_bad_image="skip")


def test_the_fingerprint_follows_content_not_place_or_time(tmp_path: Path) -> None:
    one = load(write_image_folder(tmp_path / "one" / "root", {"a": 2, "b": 2}))
    root = write_image_folder(tmp_path / "two" / "root", {"a": 2, "b": 2})
    os.utime(root / "a" / "000.png", (1, 1))
    assert load(root).fingerprint == one.fingerprint
    before = (root / "a" / "000.png").stat()
    (root / "a" / "000.png").write_bytes(encoded((9, 9, 9)))  # as long, but other pixels
    assert (root / "a" / "000.png").stat().st_size == before.st_size
    assert load(root).fingerprint != one.fingerprint


def test_a_file_that_vanishes_later_is_said_in_one_line(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "root", {"a": 3, "b": 3})
    dataset = load(root)
    (root / "a" / "000.png").unlink()
    with pytest.raises(UserError, match=r"000\.png can no longer be read"):
        dataset.open_image(0)


def test_a_file_that_changes_after_the_check_is_refused(tmp_path: Path) -> None:
    """Else its new pixels would be cached under the key of the old ones."""
    root = write_image_folder(tmp_path / "root", {"a": 3, "b": 3})
    dataset = load(root)
    (root / "a" / "000.png").write_bytes(encoded((1, 2, 3)))
    with pytest.raises(UserError, match=r"000\.png has changed"):
        dataset.open_image(0)


def saved(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return decode_rgb(buffer.getvalue())


def test_every_mode_becomes_rgb() -> None:
    grey16 = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    for kind in ("PNG", "TIFF"):
        image = saved(grey16, kind)
        assert np.asarray(image)[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]
    palette = Image.new("RGB", (2, 2), (10, 200, 30)).quantize(4)
    assert saved(palette, "PNG").getpixel((0, 0)) == (10, 200, 30)
    assert saved(palette, "PNG", transparency=b"\x00").getpixel((0, 0)) == (10, 200, 30)
    assert saved(Image.new("RGBA", (2, 2), (1, 2, 3, 0)), "PNG").getpixel((0, 0)) == (1, 2, 3)
    assert saved(Image.new("LA", (2, 2), (7, 9)), "PNG").getpixel((0, 0)) == (7, 7, 7)
    assert saved(Image.new("1", (2, 2), 1), "PNG").getpixel((0, 0)) == (255, 255, 255)
    cmyk = saved(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF")
    assert cmyk.getpixel((0, 0)) == (255, 0, 0)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert saved(Image.new("RGB", (16, 8)), "JPEG", exif=exif).size == (8, 16)


def test_what_cannot_be_rgb_says_why() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(buffer, "TIFF")
    with pytest.raises(ValueError, match="floating-point pixels"):
        decode_rgb(buffer.getvalue())
    with pytest.raises(ValueError, match=r"^cannot identify image file$"):
        decode_rgb(b"nonsense")
