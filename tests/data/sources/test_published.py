"""The catalogue's entries, and the authors' folders that they describe, in miniature."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.io import savemat

from fedprompt.cli import main as cli
from fedprompt.config.schema import to_yaml
from fedprompt.config.shipped import configs_dir
from fedprompt.data import catalogue, open_dataset
from fedprompt.data import check_copy as checking
from fedprompt.data.catalogue import entry
from fedprompt.data.dataset import TEST, TRAIN, ImageDataset
from fedprompt.data.sections import available
from fedprompt.data.sources.parts import published
from fedprompt.errors import UserError
from fedprompt.experiment.compose import compose
from fedprompt.experiment.validate import validate
from tests.support.fake_data import hub_dataset, truncated
from tests.support.published_copies import FEWER, MAKERS, SYNSETS, Made, make, split_json

NAMES = catalogue.names()
ISSUE = [
    "eurosat",
    "ucmerced",
    "resisc45",
    "optimal31",
    "aid",
    "patternnet",
    "whu_rs19",
    "rsscn7",
    "mlrsnet",
    "cifar10",
    "cifar100",
    "caltech101",
    "oxford_pets",
    "flowers102",
    "food101",
    "fgvc_aircraft",
    "stanford_cars",
    "dtd",
    "sun397",
    "ucf101",
    "imagenet",
    "imagenet_v2",
    "imagenet_sketch",
    "imagenet_a",
    "imagenet_r",
    "domainnet",
    "office_home",
    "pacs",
    "office_caltech10",
]


pytestmark = pytest.mark.usefixtures("few_classes")


def load(name: str, root: Path, **keys: Any) -> ImageDataset:
    raw = {**catalogue.data_keys(name), "root": str(root), **keys}
    config = validate({"data": raw})
    return open_dataset(config.data, 1, cache_dir=root.parent / "cache")


def one_line(name: str, root: Path, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(name, root, **keys)
    line = str(caught.value)
    assert "\n" not in line
    assert "Traceback" not in line
    return line


def expected_names(name: str, made: list[Made]) -> dict[str, str]:
    """The name used in prompts of every class key."""
    classes = entry(name).classes
    return {item.key: classes.get(item.key, item.key) for item in made}


# The entries


def test_every_set_has_an_entry_and_a_miniature_copy() -> None:
    assert set(ISSUE) <= set(NAMES)
    assert sorted(MAKERS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_entries_are_complete_and_consistent(name: str) -> None:
    found = entry(name)
    assert found.kind in ("remote sensing", "natural")
    assert found.images > found.num_classes > 1
    if found.classes:
        assert len(found.classes) == found.num_classes
        assert len(set(found.classes.values())) == found.num_classes
        assert all(name == name.strip() and "_" not in name for name in found.classes.values())
    else:
        assert found.classes_from, "the class list or where it is"
    for words in (found.title, found.size, found.licence, found.homepage, found.download):
        assert isinstance(words, str)
        assert words.strip()
    assert found.homepage.startswith("http")
    assert found.templates
    assert all(template.count("{}") == 1 for template in found.templates)
    assert found.templates_source
    assert 1990 < found.cite.year < 2027
    assert found.cite.authors
    assert found.cite.title
    assert found.cite.venue
    parts = [found.split.train, found.split.val, found.split.test]
    assert found.split.kind in ("official", "hold-out", "test only")
    assert found.split.source
    if found.split.kind != "hold-out":
        assert sum(part or 0 for part in parts) == found.images or name in ("ucf101",)
    else:
        assert parts == [None] * 3
    if found.coop_split is not None:
        coop = found.coop_split
        assert re.fullmatch(r"split_zhou_\w+\.json", coop.file)
        assert coop.train + coop.val + coop.test == found.images or name == "oxford_pets"
    if found.kind == "remote sensing" and not found.metres_per_pixel:
        assert any("resolution" in remark for remark in found.remarks)
    for members in found.superclasses.values():
        assert set(members) <= set(found.classes.values())


def test_unknown_keys_and_names_are_refused() -> None:
    raw = yaml.safe_load((catalogue.HERE / "eurosat.yaml").read_text())
    with pytest.raises(TypeError, match="licence_of_images"):
        catalogue.parse("eurosat", {**raw, "licence_of_images": "MIT"})
    with pytest.raises(UserError, match=r"no 'eurosatt' in the catalogue\. Did you mean 'eurosat'"):
        catalogue.entry("eurosatt")


def test_cifar100_superclasses_are_a_partition_of_its_classes() -> None:
    groups = entry("cifar100").superclasses
    assert len(groups) == 20
    assert all(len(members) == 5 for members in groups.values())
    assert sorted(n for g in groups.values() for n in g) == sorted(
        entry("cifar100").classes.values()
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_name_selects_the_entry_and_facts_stand_in_one_place(name: str) -> None:
    assert name in available("data")
    assert not (configs_dir() / "data" / f"{name}.yaml").exists()
    config = compose("quickstart", [f"data={name}", "data.root=/somewhere"])
    assert config.data.source == "catalogue"
    assert config.data.dataset == config.data.title == name
    assert tuple(config.data.templates) == entry(name).templates
    hub = entry(name).hub
    assert config.data.hub_id == (hub.id if hub else None)


def test_a_config_with_an_entry_round_trips(tmp_path: Path) -> None:
    config = compose("quickstart", ["data=eurosat", "data.root=/somewhere", "data.split=coop"])
    kept = tmp_path / "config.yaml"
    kept.write_text(to_yaml(config))
    assert compose(kept) == config


def test_a_set_without_a_copy_on_the_hub_says_what_to_download() -> None:
    with pytest.raises(UserError, match=r"no copy of ucf101 on the hub.*UCF-101-midframes\.zip"):
        compose("quickstart", ["data=ucf101"])


# The authors' folders


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
    "mlrsnet": {
        "airplane": "airplane",
        "dense_residential_area": "dense residential area",
        "wind_turbine": "wind turbine",
    },
}


@pytest.mark.parametrize("name", [n for n in NAMES_READ if not n.startswith("imagenet_")])
def test_label_order_follows_the_authors_list(name: str, tmp_path: Path) -> None:
    make(name, tmp_path / "copy")
    assert load(name, tmp_path / "copy").class_names == tuple(NAMES_READ[name].values())


@pytest.mark.parametrize(
    ("name", "label", "words"),
    [
        ("eurosat", 9, "sea or lake"),
        ("ucmerced", 20, "tennis court"),
        ("resisc45", 44, "wetland"),
        ("aid", 1, "bare land"),
        ("rsscn7", 3, "river or lake"),
        ("caltech101", 0, "face"),
        ("caltech101", 3, "accordion"),
        ("oxford_pets", 36, "yorkshire terrier"),
        ("flowers102", 20, "fire lily"),
        ("dtd", 30, "polka-dotted"),
        ("cifar100", 1, "aquarium fish"),
        ("pacs", 6, "person"),
        ("office_caltech10", 0, "backpack"),
    ],
)
def test_known_labels(name: str, label: int, words: str) -> None:
    assert list(entry(name).classes.values())[label] == words


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


# CIFAR


@pytest.mark.parametrize(("name", "train"), [("cifar10", 100), ("cifar100", 200)])
def test_cifar_records(name: str, train: int, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    made = make(name, root)
    dataset = load(name, root)
    classes = list(entry(name).classes)
    assert [classes[label] for label in dataset.labels_N] == [item.key for item in made]
    assert np.bincount(dataset.split_N).tolist() == [
        train,
        train // 5 if name == "cifar10" else 200,
    ]
    for i in (0, 7, len(dataset) - 1):
        image = np.asarray(dataset.open_image(i))
        assert image.shape == (32, 32, 3)
        assert (image[..., 0] == dataset.labels_N[i]).all()  # the plane of red
        assert (image[0, :, 1] == 50).all()  # green: the first row
        assert (image[:, 0, 2] == 70).all()  # blue: the first column
        assert image[1:, 1:, 1:].sum() == 0
    assert pickle.loads(pickle.dumps(dataset)).open_image(3).size == (32, 32)
    if name == "cifar100":
        assert dataset.superclass_names[classes.index("whale")] == "aquatic mammals"
        assert len(set(dataset.superclass_names)) == 20


def test_cifar_refuses_pickles_and_cut_files(tmp_path: Path) -> None:
    root = tmp_path / "copy"
    (root / "cifar-10-batches-py").mkdir(parents=True)
    line = one_line("cifar10", root)
    assert "Python version" in line
    assert "cifar-10-binary.tar.gz" in line
    make("cifar10", root)
    batch = root / "cifar-10-batches-bin" / "data_batch_3.bin"
    batch.write_bytes(batch.read_bytes()[:-1])
    assert "data_batch_3.bin is cut short" in one_line("cifar10", root)
    batch.unlink()
    assert "no file data_batch_3.bin" in one_line("cifar10", root)
    assert "lists other classes" in one_line("cifar10", _renamed_names(root))


def _renamed_names(root: Path) -> Path:
    names = root / "cifar-10-batches-bin" / "batches.meta.txt"
    names.write_text(names.read_text().replace("airplane", "plane"))
    return root


# CoOp's split files


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


# What is wrong is said in one line


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


def test_own_class_names_replace_the_entrys(tmp_path: Path) -> None:
    make("rsscn7", tmp_path / "copy")
    names = [f"scene {c}" for c in "abcdefg"]
    assert load("rsscn7", tmp_path / "copy", class_names=names).class_names == tuple(names)
    assert "has 2 names, rsscn7 has 7 classes" in one_line(
        "rsscn7", tmp_path / "copy", class_names=["a", "b"]
    )


# The hub's copies


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


# The commands


def run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: object,
    width: int = 200,
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["fedprompt", "data", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def test_list_and_show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(monkeypatch, capsys, "list", width=80)
    assert status == 0
    assert "…" not in out.split("natural")[0], "all is readable on 80 columns"
    assert "licence" not in out
    status, out, _ = run(monkeypatch, capsys, "list")
    assert "CC BY 4.0 (Mendeley Data)" in out
    assert all(name in out for name in NAMES)
    assert "27,000" in out
    status, out, _ = run(monkeypatch, capsys, "show", "whu_rs19")
    assert status == 0
    shown = yaml.safe_load(out)
    assert shown["classes"]["footballField"] == "football field"
    assert shown["cite"]["year"] == 2010
    status, _, err = run(monkeypatch, capsys, "show", "eurosta")
    assert status == 2
    assert "Did you mean 'eurosat'?" in err


def test_check_compares_and_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "copy"
    made = make("eurosat", root)
    status, out, _ = run(monkeypatch, capsys, "check", "eurosat", "--root", root)
    assert status == 1
    assert re.search(r"images\W+27,000\W+40\W+differs", out)
    assert re.search(r"classes with images\W+10\W+10\W+ok", out)
    small = dataclasses.replace(entry("eurosat"), images=len(made))
    monkeypatch.setattr(catalogue, "entry", lambda name: small)
    assert run(monkeypatch, capsys, "check", "eurosat", "--root", root)[0] == 0
    shutil.rmtree(root / "2750" / "River")
    (root / "2750" / "River").mkdir()
    status, out, _ = run(monkeypatch, capsys, "check", "eurosat", "--root", root)
    assert status == 1
    assert "no image of class 'River'" in out
    (root / "2750" / "River").rename(root / "2750" / "Rivers")
    status, out, _ = run(monkeypatch, capsys, "check", "eurosat", "--root", root)
    assert status == 1
    assert "unknown class 'Rivers'" in out
    assert "no class 'River'" in out
    status, _, err = run(monkeypatch, capsys, "check", "eurosat", "--root", tmp_path / "none")
    assert status == 2
    assert "does not exist" in err


@pytest.mark.parametrize("name", ["dtd", "flowers102", "cifar10", "pacs"])
def test_check_counts_splits_domains_and_missing_files(name: str, tmp_path: Path) -> None:
    made = make(name, tmp_path / "copy")
    finding = checking.check(entry(name), tmp_path / "copy")
    rows = {row.what: row for row in finding.rows}
    assert rows["images"].found == len(made)
    assert rows["images"].stated == entry(name).images
    assert rows["classes with images"].ok
    assert not finding.ok
    if name == "pacs":
        assert rows["images of domain art painting"].found == 28
        return
    assert rows["test images"].found == sum(item.split == "test" for item in made)
    if name == "dtd":
        made[0].path.unlink()
        finding = checking.check(entry(name), tmp_path / "copy")
        assert finding.problems == (f"missing file: banded/{made[0].path.name}",)


def test_prepare_reads_all_images_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "copy"
    made = make("rsscn7", root)
    made[2].path.write_bytes(truncated())
    arguments = ("prepare", "rsscn7", "--root", root, "--cache", tmp_path / "cache")
    status, out, _ = run(monkeypatch, capsys, *arguments)
    assert status == 0
    assert "27 images of 7 classes" in out
    assert str(made[2].path) in out
    assert list((tmp_path / "cache" / "scan").glob("*.json"))
    status, _, err = run(monkeypatch, capsys, "prepare", "rsscn7")
    assert status == 2
    assert "give --root DIR" in err
