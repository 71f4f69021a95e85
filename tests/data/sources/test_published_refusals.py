"""A damaged copy of a published data set is refused in one line that names what is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from fedprompt.data.catalogue import entry
from tests.support.fake_data import truncated
from tests.support.published_copies import make
from tests.support.published_loading import NAMES, load, one_line

pytestmark = pytest.mark.usefixtures("few_classes")


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_folder_says_what_to_download_and_where_to_put_it(
    name: str, tmp_path: Path
) -> None:
    found = entry(name)
    line = one_line(name, tmp_path / "nowhere")
    assert "does not exist" in line
    assert found.homepage in line
    assert found.download in line
    assert "set data.root to the folder that holds '" in line
    (tmp_path / "holiday" / "beach_party").mkdir(parents=True)
    line = one_line(name, tmp_path / "holiday")
    assert "found: beach_party/" in line
    assert found.homepage in line


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("oxford_pets", "annotations/test.txt"),
        ("flowers102", "setid.mat"),
        ("flowers102", "imagelabels.mat"),
        ("food101", "meta/classes.txt"),
        ("fgvc_aircraft", "images_variant_val.txt"),
        ("stanford_cars", "cars_test_annos_withlabels.mat"),
        ("stanford_cars", "devkit/cars_meta.mat"),
        ("dtd", "labels/train1.txt"),
        ("sun397", "Testing_01.txt"),
        ("ucf101", "ucfTrainTestlist/classInd.txt"),
        ("imagenet", "classnames.txt"),
        ("imagenet_r", "classnames.txt"),
        ("domainnet", "real_test.txt"),
        ("cifar100", "fine_label_names.txt"),
    ],
)
def test_a_missing_annotation_file_is_named(name: str, gone: str, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    make(name, root)
    (path,) = root.rglob(Path(gone).name)
    path.unlink()
    line = one_line(name, root)
    assert f"no file {gone}" in line
    assert entry(name).download in line


def test_other_classes_and_missing_ones_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "copy"
    made = make("eurosat", root)
    (root / "2750" / "Forest").rename(root / "2750" / "Forrest")
    line = one_line("eurosat", root)
    assert "class 'Forrest' is not one of the 10. Did you mean 'Forest'?" in line
    shutil.rmtree(root / "2750" / "Forrest")
    assert "class 'Forest' missing" in one_line("eurosat", root)
    assert made
    make("office_home", tmp_path / "home")
    for domain in entry("office_home").domains:
        shutil.rmtree(tmp_path / "home" / "OfficeHomeDataset_10072016" / domain / "TV")
    assert "3 classes instead of 4" in one_line("office_home", tmp_path / "home")


def test_lists_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "food"
    make("food101", root)
    (root / "meta/test.txt").write_text("apple_pie\n")
    assert "test.txt, line 1: 'apple_pie' is not what" in one_line("food101", root)
    (root / "meta/test.txt").write_text("pizza/1\n")
    assert "class 'pizza' is not in" in one_line("food101", root)
    root = tmp_path / "net"
    make("domainnet", root)
    lines = (root / "real_test.txt").read_text().replace("zigzag", "aircraft_carrier")
    (root / "real_test.txt").write_text(lines)
    assert "class 'aircraft_carrier' has the labels 0 and 344" in one_line("domainnet", root)
    root = tmp_path / "flowers"
    make("flowers102", root)
    savemat(root / "setid.mat", {"trnid": [[1]], "valid": [[2]], "tstid": [[999]]})
    assert "names image 999" in one_line("flowers102", root)
    (root / "imagelabels.mat").write_bytes(b"not a matrix")
    assert "is no MATLAB file" in one_line("flowers102", root)
    root = tmp_path / "cars"
    make("stanford_cars", root)
    savemat(
        root / "cars_test_annos_withlabels.mat",
        {"annotations": np.array([[("a.jpg",)]], dtype=[("fname", object)])},
    )
    assert "has no class of each image" in one_line("stanford_cars", root)


def test_images_that_were_not_unpacked_are_noticed(tmp_path: Path) -> None:
    root = tmp_path / "copy"
    make("food101", root)
    shutil.rmtree(root / "images")
    (root / "images").mkdir()
    line = one_line("food101", root)
    assert "none of the 12 listed images is in" in line
    make("imagenet", tmp_path / "net")
    val = tmp_path / "net" / "images" / "val"
    shutil.rmtree(val)
    val.mkdir()
    assert f"{val} holds no class folders" in one_line("imagenet", tmp_path / "net")


def test_bad_and_missing_images_follow_on_bad_image(tmp_path: Path) -> None:
    root = tmp_path / "copy"
    made = make("dtd", root)
    made[0].path.write_bytes(truncated())
    made[50].path.unlink()
    line = one_line("dtd", root, validation="train")
    assert str(made[0].path) in line
    assert "and 1 more" in line
    dataset = load("dtd", root, validation="train", on_bad_image="skip")
    assert len(dataset) == len(made) - 2
    assert {bad.where for bad in dataset.bad_images} == {str(made[0].path), str(made[50].path)}
