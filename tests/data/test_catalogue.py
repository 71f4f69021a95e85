"""The facts in the catalogue's entries are complete and consistent, and a name selects an entry."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from fedprompt.config.schema import to_yaml
from fedprompt.config.shipped import configs_dir
from fedprompt.data import catalogue
from fedprompt.data.catalogue import entry
from fedprompt.data.sections import available
from fedprompt.errors import UserError
from fedprompt.experiment.compose import compose
from tests.support.published_copies import MAKERS
from tests.support.published_loading import NAMES

pytestmark = pytest.mark.usefixtures("few_classes")


REQUIRED = [
    "eurosat",
    "ucmerced",
    "resisc45",
    "optimal31",
    "aid",
    "patternnet",
    "whu_rs19",
    "rsscn7",
    "mlrsnet",
    "millionaid",
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


def test_every_set_has_an_entry_and_a_miniature_copy() -> None:
    assert set(REQUIRED) <= set(NAMES)
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
