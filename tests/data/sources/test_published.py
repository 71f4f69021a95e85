"""Every published data set is read from a miniature copy of the authors' folder."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprompt.data.catalogue import entry
from fedprompt.data.dataset import TEST, TRAIN
from tests.support.published_copies import FEWER, SYNSETS, make
from tests.support.published_loading import NAMES, load, one_line

pytestmark = pytest.mark.usefixtures("few_classes")


@pytest.mark.parametrize("name", NAMES)
def test_a_miniature_copy_loads(name: str, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    made = make(name, root)
    found = entry(name)
    dataset = load(name, root, validation="train")
    assert len(dataset) == len(made)
    assert len(dataset.class_names) == FEWER.get(name, found.num_classes)
    if found.classes:
        assert dataset.class_names == tuple(found.classes.values())
    if found.layout["reader"] == "cifar_binary":
        return  # checked pixel by pixel below
    by_path = {item.path: item for item in made}
    opener: Any = dataset.open_image
    names = NAMES_READ.get(name) or dict(found.classes)
    for i, path in enumerate(opener.paths):
        item = by_path[opener.root / path]
        assert dataset.class_names[dataset.labels_N[i]] == names[item.key]
        assert dataset.domain_names[dataset.domains_N[i]] == (
            found.domains[item.domain] if item.domain else name
        )
        if item.split is not None:
            assert dataset.split_N[i] == (TEST if item.split == "test" else TRAIN)
    tests = np.bincount(dataset.labels_N[dataset.split_N == TEST], minlength=found.num_classes)
    assert (tests[: len(dataset.class_names)] > 0).all()
    red = dataset.open_image(3).getpixel((4, 4))[0]
    assert abs(red - (made.index(by_path[opener.root / opener.paths[3]]) * 7) % 256) < 4
    assert pickle.loads(pickle.dumps(dataset)).open_image(0).mode == "RGB"


NAMES_READ = {  # names made from the copies' own class lists, in label order
    "imagenet": SYNSETS,
    "imagenet_v2": SYNSETS,
    "imagenet_sketch": SYNSETS,
    "imagenet_a": SYNSETS,
    "imagenet_r": SYNSETS,
    "sun397": {
        "a/abbey": "abbey",
        "a/apartment_building/outdoor": "outdoor apartment building",
        "a/apse/indoor": "indoor apse",
        "c/church/outdoor": "outdoor church",
        "z/zen_garden": "zen garden",
    },
    "ucf101": {
        "ApplyEyeMakeup": "Apply Eye Makeup",
        "Archery": "Archery",
        "HandstandPushups": "Handstand Pushups",
        "TaiChi": "Tai Chi",
        "YoYo": "Yo Yo",
    },
    "stanford_cars": {
        "AM General Hummer SUV 2000": "2000 AM General Hummer SUV",
        "Acura RL Sedan 2012": "2012 Acura RL Sedan",
        "smart fortwo Convertible 2012": "2012 smart fortwo Convertible",
    },
    "fgvc_aircraft": {c: c for c in ("707-320", "727-200", "A300B4", "F-16A/B", "Yak-42")},
    "food101": {
        "apple_pie": "apple pie",
        "baby_back_ribs": "baby back ribs",
        "creme_brulee": "creme brulee",
        "waffles": "waffles",
    },
    "domainnet": {
        "aircraft_carrier": "aircraft carrier",
        "The_Eiffel_Tower": "The Eiffel Tower",
        "zigzag": "zigzag",
    },
    "office_home": {
        "Alarm_Clock": "alarm clock",
        "Desk_Lamp": "desk lamp",
        "TV": "tv",
        "ToothBrush": "tooth brush",
    },
}


@pytest.mark.parametrize("name", [n for n in NAMES_READ if not n.startswith("imagenet_")])
def test_label_order_follows_the_authors_list(name: str, tmp_path: Path) -> None:
    make(name, tmp_path / "copy")
    assert load(name, tmp_path / "copy").class_names == tuple(NAMES_READ[name].values())


def test_validation_images_are_left_out_or_trained_on(tmp_path: Path) -> None:
    make("dtd", tmp_path / "copy")
    without = load("dtd", tmp_path / "copy")
    assert np.bincount(without.split_N).tolist() == [47, 47]
    assert np.bincount(load("dtd", tmp_path / "copy", validation="train").split_N).tolist() == [
        94,
        47,
    ]


def test_hold_out_takes_from_every_class_and_domain(tmp_path: Path) -> None:
    make("pacs", tmp_path / "copy")
    dataset = load("pacs", tmp_path / "copy")
    cells = dataset.labels_N * 4 + dataset.domains_N
    assert np.bincount(cells[dataset.split_N == TEST], minlength=28).tolist() == [1] * 28
    assert dataset.domain_names == ("art painting", "cartoon", "photo", "sketch")


def test_variants_of_imagenet_are_for_tests_and_v2_folders_are_label_numbers(
    tmp_path: Path,
) -> None:
    for name in ("imagenet_v2", "imagenet_a"):
        make(name, tmp_path / name)
        assert set(load(name, tmp_path / name).split_N.tolist()) == {TEST}
    assert load("imagenet_a", tmp_path / "imagenet_a").class_names == (
        "goldfish",
        "great white shark",
        "tiger shark",
    )


def test_some_domains_can_be_chosen(tmp_path: Path) -> None:
    root = tmp_path / "copy"
    make("domainnet", root)
    for folder in ("infograph", "quickdraw", "real", "sketch"):
        shutil.rmtree(root / folder)
        (root / f"{folder}_train.txt").unlink()
    dataset = load("domainnet", root, domains=["painting", "clipart"])
    assert dataset.domain_names == ("clipart", "painting")
    assert np.bincount(dataset.domains_N).tolist() == [9, 9]
    assert "no file infograph_train.txt" in one_line("domainnet", root)
    assert "no domain 'paint'. Did you mean 'painting'" in one_line(
        "domainnet", root, domains=["paint"]
    )


def test_root_may_be_the_folder_with_the_classes_itself(tmp_path: Path) -> None:
    make("eurosat", tmp_path / "copy")
    make("pacs", tmp_path / "pacs")
    assert len(load("eurosat", tmp_path / "copy" / "2750")) == 40
    assert len(load("pacs", tmp_path / "pacs" / "kfold")) == 7 * 4 * 4
    make("ucmerced", tmp_path / "merced")
    images = tmp_path / "merced" / "UCMerced_LandUse" / "Images"
    assert load("ucmerced", images).fingerprint == load("ucmerced", tmp_path / "merced").fingerprint


def test_own_class_names_replace_the_entrys(tmp_path: Path) -> None:
    make("rsscn7", tmp_path / "copy")
    names = [f"scene {c}" for c in "abcdefg"]
    assert load("rsscn7", tmp_path / "copy", class_names=names).class_names == tuple(names)
    assert "has 2 names, rsscn7 has 7 classes" in one_line(
        "rsscn7", tmp_path / "copy", class_names=["a", "b"]
    )
