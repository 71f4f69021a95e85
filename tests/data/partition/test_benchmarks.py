"""Federations of published data sets: configs, sweeps, and several sources under common labels."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedprompt.config.schema import Config
from fedprompt.config.shipped import configs_dir
from fedprompt.data import catalogue, open_dataset
from fedprompt.data.catalogue import entry
from fedprompt.data.dataset import TEST, TRAIN, ImageDataset
from fedprompt.data.partition import dense, describe, make_partition
from fedprompt.data.sections import available
from fedprompt.data.sources.parts import common_labels
from fedprompt.errors import UserError
from fedprompt.experiment.compose import compose
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import run
from fedprompt.experiment.validate import validate
from tests.support.published_copies import make

BENCHMARKS = {
    "fed_optimal": "optimal31",
    "fed_ucmerced": "ucmerced",
    "fed_nwpu": "resisc45",
    "cifar100_100clients": "cifar100",
    "domainnet_domains": "domainnet",
    "office_domains": "office_home",
}
SWEEPS = ["fed_optimal", "fed_ucmerced", "fed_nwpu"]
FEDRS = common_labels.read("fedrs")


pytestmark = pytest.mark.usefixtures("few_classes")


def short(root: Path, out: Path) -> list[str]:
    """Changes that run an experiment on a miniature copy, for a round."""
    return [
        f"data.root='{root}'",
        "backbone=tiny",
        "federation.rounds=1",
        "evaluation.every=1",
        "evaluation.local_only=false",
        "output.report=false",
        f"output.dir='{out}'",
    ]


def finished(config: Config) -> dict[str, Any]:
    summary = json.loads((run(config, QuietDisplay()) / "summary.json").read_text())
    assert isinstance(summary, dict)
    return summary


def counts(dataset: ImageDataset, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Images per client and class, and per client and domain."""
    described = describe(dataset, make_partition(dataset, config.partition, config.seed))
    classes, domains = len(dataset.class_names), len(dataset.domain_names)
    held = dense(described["train_counts"], classes) + dense(described["test_counts"], classes)
    return held, dense(described["domain_counts"], domains)


def test_every_benchmark_is_shipped_and_says_what_is_not_the_papers() -> None:
    for name in (*BENCHMARKS, "fedrs_bench"):
        assert name in available("experiment")
        assert compose(name).experiment == name
    for name in SWEEPS:
        opening = (configs_dir() / "experiment" / f"{name}.yaml").read_text().splitlines()[0]
        assert "RECONSTRUCTED FROM" in opening
        assert compose(name).data.dataset == BENCHMARKS[name]
    assert "This is NOT that benchmark" in (
        (configs_dir() / "experiment" / "fedrs_bench.yaml").read_text()
    )


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_runs_on_a_miniature_copy(name: str, tmp_path: Path) -> None:
    make(BENCHMARKS[name], tmp_path / "images")
    config = compose(name, short(tmp_path / "images", tmp_path / "run"))
    summary = finished(config)
    assert summary["clients"] == config.partition.clients
    assert summary["rounds"] == 1
    assert summary["rejected_replies"] == 0
    assert 0 <= summary["global"]["accuracy"] <= 1
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    taking_part = round(config.federation.fraction * config.partition.clients)
    assert line["clients"] == {"sampled": taking_part, "accepted": taking_part, "rejected": 0}


@pytest.mark.parametrize("name", ["domainnet_domains", "office_domains"])
def test_clients_are_domains(name: str, tmp_path: Path) -> None:
    make(BENCHMARKS[name], tmp_path / "images")
    config = compose(name, short(tmp_path / "images", tmp_path / "run"))
    dataset = open_dataset(config.data, config.seed)
    _, domain_KD = counts(dataset, config)
    assert ((domain_KD > 0) == np.eye(len(dataset.domain_names))).all()


def test_office_caltech10_and_its_twenty_clients(tmp_path: Path) -> None:
    make("office_caltech10", tmp_path / "images")
    changes = ["data=office_caltech10", "partition.clients=20", "partition.min_images=1"]
    changes += ["partition.scheme=domain_dirichlet", "partition.alpha=0.3"]
    config = compose("office_domains", [*changes, *short(tmp_path / "images", tmp_path / "run")])
    _, domain_KD = counts(open_dataset(config.data, config.seed), config)
    assert ((domain_KD > 0).sum(0) == 5).all()
    assert ((domain_KD > 0).sum(1) == 1).all()


def test_cifar100_clients_hold_few_superclasses(tmp_path: Path) -> None:
    make("cifar100", tmp_path / "images")
    config = compose("cifar100_100clients", short(tmp_path / "images", tmp_path / "run"))
    dataset = open_dataset(config.data, config.seed)
    assert len(set(dataset.superclass_names)) == 20
    held_KC, _ = counts(dataset, config)
    assert held_KC.shape == (100, 100)
    assert (held_KC.sum(1) == 2).all()


@pytest.mark.parametrize("name", SWEEPS)
def test_every_row_of_a_sweep_can_be_dealt(name: str, tmp_path: Path) -> None:
    sweep = yaml.safe_load((configs_dir() / "sweep" / f"{name}.yaml").read_text())
    assert sweep["experiment"] == name
    assert len(sweep["rows"]) == 18
    make(BENCHMARKS[name], tmp_path / "images")
    dataset, seen = None, set()
    for row, changes in sweep["rows"].items():
        config = compose(name, [*changes, f"data.root='{tmp_path / 'images'}'"])
        dataset = dataset or open_dataset(config.data, config.seed)
        clients, rule = row.removeprefix("K = ").split(", ")
        assert config.partition.clients == int(clients)
        if rule.startswith("Dirichlet"):
            assert config.partition.scheme == "dirichlet"
            assert config.partition.alpha == float(rule.removeprefix("Dirichlet "))
        held_KC, _ = counts(dataset, config)
        assert held_KC.shape == (int(clients), len(dataset.class_names))
        if rule == "pathological":
            assert ((held_KC > 0).sum(0) == 1).all()
        seen.add((config.partition.clients, rule))
    assert len(seen) == 18


# Several sources


def sources(root: Path) -> Path:
    for name in FEDRS.sources:
        make(name, root / name)
    return root


def test_common_labels_name_true_classes_once() -> None:
    assert len(FEDRS.classes) == 15
    for label, by_source in FEDRS.classes.items():
        assert len(by_source) >= 4, label
        assert set(by_source) <= set(FEDRS.sources)
    for source in FEDRS.sources:
        listed = [c for by_source in FEDRS.classes.values() for c in by_source.get(source, ())]
        assert len(set(listed)) == len(listed), "a class stands under one label"
        assert set(listed) <= set(entry(source).classes.values())
        assert len(listed) >= 8


def test_images_of_several_sources_keep_their_pixels_and_names(tmp_path: Path) -> None:
    root = sources(tmp_path / "all")
    config = compose("fedrs_bench", [f"data.root='{root}'"])
    dataset = open_dataset(config.data, config.seed)
    assert dataset.class_names == tuple(FEDRS.classes)
    assert dataset.domain_names == tuple(FEDRS.sources)
    assert len(set(dataset.image_names)) == len(dataset)
    assert set(dataset.split_N.tolist()) == {TRAIN, TEST}
    for d, source in enumerate(FEDRS.sources):
        keys = {**catalogue.data_keys(source), "root": str(root / source)}
        alone = open_dataset(validate({"data": keys}).data, config.seed)
        mine = np.flatnonzero(dataset.domains_N == d)
        assert len(mine) == sum(4 * len(c.get(source, ())) for c in FEDRS.classes.values())
        for i in mine:
            name, _, theirs = dataset.image_names[i].partition("/")
            row = alone.image_names.index(theirs)
            assert name == source
            assert dataset.split_N[i] == alone.split_N[row]
            label = dataset.class_names[dataset.labels_N[i]]
            assert alone.class_names[alone.labels_N[row]] in FEDRS.classes[label][source]
        some, row = int(mine[-1]), alone.image_names.index(theirs)
        assert dataset.open_image(some).tobytes() == alone.open_image(row).tobytes()
    again = pickle.loads(pickle.dumps(dataset))
    assert again.open_image(0).tobytes() == dataset.open_image(0).tobytes()


def test_clients_own_one_source_and_run(tmp_path: Path) -> None:
    root = sources(tmp_path / "all")
    config = compose("fedrs_bench", short(root, tmp_path / "run"))
    dataset = open_dataset(config.data, config.seed)
    _, domain_KD = counts(dataset, config)
    assert domain_KD.shape == (67, 6)
    assert ((domain_KD > 0).sum(1) == 1).all()
    means = domain_KD.sum(0) / (domain_KD > 0).sum(0)  # images per client, by source
    assert means.max() / means.min() < 1.25
    summary = finished(config)
    assert summary["clients"] == 67
    assert summary["classes"] == 15


def test_some_of_the_sources(tmp_path: Path) -> None:
    root = sources(tmp_path / "all")
    some = ["data.domains=[whu_rs19,eurosat]", f"data.root='{root}'"]
    dataset = open_dataset(compose("fedrs_bench", some).data, 1)
    assert dataset.domain_names == ("eurosat", "whu_rs19")
    assert len(dataset.class_names) == 15
    everything = open_dataset(compose("fedrs_bench", some[1:]).data, 1)
    assert dataset.fingerprint != everything.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.common_labels=fedr"], "no list of common labels 'fedr'. Did you mean 'fedrs'?"),
        (["data.common_labels=null"], "source 'multi' needs 'common_labels': fedrs"),
        (["data.domains=[aidd]"], "data.domains: fedrs has no data set 'aidd'. Did you mean"),
        (["data.class_names=[a, b]"], "data.class_names has 2 names, fedrs has 15"),
        (["data.root=/nowhere"], "/nowhere/eurosat"),
    ],
)
def test_wrong_sources_are_refused_with_one_line(changes: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        open_dataset(compose("fedrs_bench", ["data.root=/none", *changes]).data, 1)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
