"""Files of common labels: the shipped ones against class lists, any sources, and wrong files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import fedprompt
from fedprompt.data import open_dataset
from fedprompt.data.catalogue import entry
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.partition import dense, describe, make_partition
from fedprompt.data.sources.parts import common_labels
from fedprompt.errors import UserError
from fedprompt.experiment.compose import compose
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import run
from fedprompt.experiment.validate import validate
from tests.support.doc_pages import DOCS
from tests.support.published_copies import make

FIVE = ("patternnet", "ucmerced", "eurosat", "mlrsnet", "millionaid")


def open_data(**keys: Any) -> ImageDataset:
    return fedprompt.data.open("scenes_five_sources", **keys)


def written(folder: Path, content: dict[str, Any]) -> str:
    path = folder / "labels.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Miniature copies of the five sources and of RESISC45, in their published layouts."""
    root = tmp_path_factory.mktemp("sources")
    for name in (*FIVE, "resisc45"):
        make(name, root / name)
    return root


@pytest.mark.parametrize("name", common_labels.names())
def test_shipped_files_place_every_class_of_every_source_once(name: str) -> None:
    common = common_labels.read(name)
    for source, section in common.sources.items():
        classes = list(section.get("class_names", ()))
        if not section:
            classes = list(entry(source).classes.values())
        placed = [*common.label_of(source), *common.left_out.get(source, ())]
        if classes:
            assert sorted(placed) == sorted(classes)
        assert len(set(placed)) == len(placed) > 0


def test_five_remote_sensing_sources_have_the_published_numbers_of_labels() -> None:
    common = common_labels.read("rs_five_sources")
    assert tuple(common.sources) == (*FIVE, "resisc45")
    assert len(common.labels_of(FIVE)) == len(common.classes) == 80
    assert len(common.labels_of(FIVE[:4])) == 66
    assert len(common.labels_of(["resisc45"])) == 39
    assert common.label_of("patternnet")["parking space"] == "parking area"
    assert common.label_of("mlrsnet")["harbor and port"] == "harbor or port"
    assert not any("resisc45" in common.left_out.get(name, ()) for name in FIVE)


@pytest.mark.parametrize("present", [True, False])
def test_million_aid_is_used_where_its_folder_is(
    copies: Path, tmp_path: Path, present: bool
) -> None:
    root = tmp_path / "some"
    root.mkdir()
    for name in FIVE[: 5 if present else 4]:
        (root / name).symlink_to(copies / name)
    dataset = fedprompt.data.open("rs_five_sources", root=str(root))
    assert dataset.domain_names == FIVE[: 5 if present else 4]
    assert len(dataset.class_names) == (80 if present else 66)
    assert len(set(dataset.labels_N.tolist())) == len(dataset.class_names)
    assert any("millionaid" in note for note in dataset.notes)
    named = fedprompt.data.open("rs_five_sources", root=str(root), domains=["eurosat", "ucmerced"])
    assert named.domain_names == ("ucmerced", "eurosat")
    assert not named.notes


def test_labels_are_those_of_the_file(copies: Path) -> None:
    common = common_labels.read("rs_five_sources")
    dataset = fedprompt.data.open("rs_five_sources", root=str(copies))
    for name, label in (("mlrsnet/harbor&port", "harbor or port"), ("resisc45", "")):
        rows = [i for i, image in enumerate(dataset.image_names) if image.startswith(name)]
        assert {dataset.class_names[dataset.labels_N[i]] for i in rows} == ({label} - {""})
    for d, source in enumerate(dataset.domain_names):
        labels = {dataset.class_names[n] for n in dataset.labels_N[dataset.domains_N == d]}
        assert labels == set(common.label_of(source).values())


@pytest.mark.parametrize("sources", [5, 4])
def test_every_client_has_one_source(copies: Path, sources: int) -> None:
    changes = [f"data.root='{copies}'", "data.domains=[" + ",".join(FIVE[:sources]) + "]"]
    config = compose("rs_five_sources", changes)
    dataset = open_dataset(config.data, config.seed)
    described = describe(dataset, make_partition(dataset, config.partition, config.seed))
    held_KD = dense(described["domain_counts"], sources) > 0
    assert held_KD.shape == (5, sources)
    assert (held_KD.sum(1) == 1).all()
    # Without Million-AID, the largest of the miniatures, as of the data sets, has two clients.
    assert held_KD.sum(0).tolist() == ([1] * 5 if sources == 5 else [1, 1, 1, 2])


def test_the_experiment_runs_and_tests_an_unseen_data_set_twice(
    copies: Path, tmp_path: Path
) -> None:
    changes = [f"data.root='{copies}'", f"output.dir='{tmp_path / 'run'}'", "backbone=tiny"]
    changes += ["data.domains=[eurosat]", "partition.scheme=iid", "partition.clients=2"]
    changes += ["output.report=false", "data.templates=['{}']"]
    changes += ["federation.rounds=1", "evaluation.every=1", "training.local_epochs=1"]
    changes += ["protocols=[global,cross_data_set]", "partition.shots=1", "training.batch_size=32"]
    assert compose("rs_five_sources", changes).method.name == "dualprompt_rs"
    # Text prompts alone, because image prompts would take every image through the tower again.
    config = compose("rs_five_sources", [*changes, "method=promptfl", "method.context_tokens=2"])
    summary = json.loads((run(config, QuietDisplay()) / "summary.json").read_text())
    assert summary["classes"] == len(entry("eurosat").classes)
    rows = {row["data"]: row for row in summary["protocols"]["cross_data_set"]["rows"]}
    own, common = rows["RESISC45, own names"], rows["RESISC45, common labels"]
    # One test image of each class; four of the 45 classes have no common label.
    assert (own["images"], own["classes"]) == (45, 45)
    assert (common["images"], common["classes"]) == (41, 39)
    # Of EuroSAT's labels, forest and river are names of RESISC45's own; industrial area too.
    assert (own["known_classes"], common["known_classes"]) == (3, 4)


def test_embedded_sources_have_classes_of_their_own(tmp_path: Path) -> None:
    config = compose("scenes_five_sources", [f"output.dir='{tmp_path / 'run'}'"])
    dataset = fedprompt.data.open("scenes_five_sources")
    assert len(dataset.domain_names) == 5
    assert "tundra" not in dataset.domain_names
    held = np.zeros((5, len(dataset.class_names)), dtype=bool)
    held[dataset.domains_N, dataset.labels_N] = True
    assert held.any(0).all()
    assert not held.all(1).any()
    unseen = fedprompt.data.open("scenes_five_sources", domains=["tundra"])
    assert unseen.class_names == dataset.class_names
    assert config.partition.clients == 5


def folder_source(root: Path) -> dict[str, Any]:
    """A label file that joins a folder of two classes with embedded scenes."""
    make("rsscn7", root / "fields")
    for name in ("aGrass", "bField"):
        (root / "mine" / name).mkdir(parents=True)
        for i in range(4):
            source = next((root / "fields").rglob("*.jpg"))
            (root / "mine" / name / f"{i}.jpg").write_bytes(source.read_bytes())
    return {
        "sources": {
            "mine": {"source": "folder"},
            "scenes": {
                "use": "aerial_scenes",
                "domains": ["delta"],
                "class_names": ["river", "forest"],
                "images_per_class": 4,
            },
        },
        "labels": {
            "green": {"mine": ["a grass", "b field"], "scenes": ["forest"]},
            "water": {"scenes": ["river"]},
        },
    }


def test_a_file_joins_any_sources(tmp_path: Path) -> None:
    name = written(tmp_path, folder_source(tmp_path))
    dataset = open_data(common_labels=name, root=str(tmp_path), title="joined")
    assert dataset.class_names == ("green", "water")
    assert np.bincount(dataset.domains_N).tolist() == [8, 8]
    assert np.bincount(dataset.labels_N).tolist() == [12, 4]
    assert dataset.open_image(0).size == (8, 8)


def small() -> dict[str, Any]:
    section = {"use": "aerial_scenes", "class_names": ["river", "forest"]}
    return {
        "sources": {"a": section, "b": {**section, "domains": ["delta"]}},
        "labels": {
            "water": {"a": ["river"], "b": ["river"]},
            "wood": {"a": ["forest"], "b": ["forest"]},
        },
    }


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        (("labels", "water", "a"), ["rivr"], ["source 'a'", "'rivr'", "river"]),
        (("labels", "water", "a"), ["river", "river"], ["'river'", "twice"]),
        (("labels", "wood", "a"), ["forest", "river"], ["'river'", "'water'", "'wood'"]),
        (("labels", "wood"), {"b": ["forest"]}, ["'forest'", "source 'a'", "left_out.a"]),
        (("labels", "wood", "c"), ["forest"], ["'c'", "'sources'"]),
        (("labels", "Water"), {"a": ["river"]}, ["'Water'", "'water'"]),
        (("labels", "wood", "a"), "forest", ["label 'wood'", "'forest'", "list"]),
        (("labels", "wood"), {}, ["label 'wood'", "no class"]),
        (("labels",), [], ["'labels'"]),
        (("label",), {}, ["'label'", "labels"]),
        (("left_out",), {"a": ["river"]}, ["'river'", "left_out", "'water'"]),
        (("on_request",), ["d"], ["'on_request'", "'d'"]),
        (("on_request",), ["a", "b"], ["on_request"]),
        (("if_present",), "a", ["'if_present'", "list"]),
        (("sources",), [], ["'sources'"]),
        (("sources",), ["eurosat", "eurosat"], ["twice"]),
        (("sources",), ["eurosatt"], ["eurosatt", "eurosat"]),
        (("sources", "a", "images"), 4, ["images", "a"]),
        (("sources", "a"), {"source": "multi"}, ["'a'", "common labels itself"]),
        (("sources", "a"), {"source": "aerial_objects"}, ["'a'", "several labels"]),
    ],
)
def test_wrong_files_are_refused_in_one_line_before_anything_is_opened(
    tmp_path: Path, path: tuple[str, ...], value: Any, parts: list[str]
) -> None:
    content = small()
    place: dict[str, Any] = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    name = written(tmp_path, content)
    with pytest.raises(UserError) as caught:
        validate({"data": {"source": "multi", "common_labels": name}})
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_class_that_only_the_folder_has_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    content = folder_source(tmp_path)
    content["labels"]["green"]["mine"] = ["a grass"]
    name = written(tmp_path, content)
    with pytest.raises(UserError, match=r"'b field' of source 'mine'.*left_out\.mine"):
        open_data(common_labels=name, root=str(tmp_path))
    with pytest.raises(UserError, match="cannot read"):
        open_data(common_labels=str(tmp_path / "none.yaml"))


def test_label_keys_that_stand_twice_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.yaml"
    path.write_text("sources: [eurosat]\nlabels:\n  a: {eurosat: [forest]}\n  a: {}\n")
    with pytest.raises(UserError, match=r"labels\.yaml"):
        common_labels.read(str(path))


def test_the_example_in_the_documentation_is_a_valid_file(tmp_path: Path) -> None:
    page = (DOCS / "datasets.md").read_text(encoding="utf-8")
    path = tmp_path / "labels.yaml"
    path.write_text(page.split("```yaml\nsources:")[1].split("```")[0].join(("sources:", "")))
    assert tuple(common_labels.read(str(path)).sources) == ("eurosat", "my_images")
