"""Every key of an experiment that is a path is known to be one; other machines follow none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from fedprompt.config.schema import Config, to_yaml
from fedprompt.data.sources.hub import HubConfig
from fedprompt.data.sources.registry import all_sources
from fedprompt.deploy.node_config import NodeSettings, on_node
from fedprompt.errors import UserError
from fedprompt.evaluation.registry import all_protocols
from fedprompt.experiment.compose import parse
from fedprompt.experiment.paths import ELSEWHERE, absolute, hidden, without_paths
from fedprompt.federation.registry import all_strategies
from fedprompt.methods.registry import all_methods
from tests.support.builders import small_config

# Texts of any kind that name no file: a new key is put here, or gets `option(..., path=True)`.
NO_PATH = {
    "experiment", "protocols", "targets", "out", "name", "base", "options", "model", "pretrained",
    "title", "templates", "class_names", "dataset", "hub_config", "hub_revision",
    "train_split", "test_split", "image_column", "label_column", "domain_column", "domains",
    "ray_address", "loggers", "words", "style", "context_init", "template", "private",
    "token_tensors", "domain", "source", "chosen_by",
    "validation_split", "negative_init", "teacher_templates", "classes", "kinds",
    "teacher", "client_models",  # names of shipped backbones, and nothing else
    "client_weights", "formats", "target_modules",
}  # fmt: skip
PATHS = {
    "backbone.checkpoint", "data.root", "data.folders", "data.hub_id", "data.descriptions",
    "data.common_labels", "partition.file", "conditions.trace", "clock.devices",
    "output.root", "output.dir", "output.cache",
}  # fmt: skip
SIMULATED = {"conditions.trace", "clock.devices"}
"""Further paths, of sections that a deployment refuses."""
OF_OTHER_SOURCES = {"data.hub_id", "data.common_labels"}
"""No source has one of these keys and the folders of clients."""
ONE_STRATEGY = {"strategy.detector"}
"""Further paths, which only one strategy has."""
SECRET = "/server/secret"


def schemas() -> Iterator[tuple[str, type]]:
    """Every dataclass that an experiment can hold, with its place."""
    hints = get_type_hints(Config)
    yield "", Config
    for name, kind in hints.items():
        if dataclasses.is_dataclass(kind):
            yield f"{name}.", kind  # type: ignore[misc]
    for source in all_sources().values():
        yield "data.", source.Config
    for method in all_methods().values():
        yield "method.", method.Config
    for strategy in all_strategies().values():
        yield "strategy.", strategy.Config
    for protocol in all_protocols().values():
        yield "protocol_options.", protocol.Options


def holds_text(kind: Any) -> bool:
    """Whether a value of this type may be, or hold, any text."""
    return kind in (str, Any) or any(map(holds_text, get_args(kind)))


def texts() -> dict[str, bool]:
    """Keys whose values are any text, and whether they say that they are paths."""
    found = {}
    for place, schema in schemas():
        hints = get_type_hints(schema)
        for field in dataclasses.fields(schema):
            literal = getattr(hints[field.name], "__origin__", None) is not None and all(
                isinstance(a, str) for a in get_args(hints[field.name])
            )
            if holds_text(hints[field.name]) and not literal:
                found[place + field.name] = bool(field.metadata.get("path"))
    return found


def test_every_text_is_a_path_or_known_to_be_none() -> None:
    sections = {f.name for f in dataclasses.fields(Config)} - NO_PATH
    found = {key: path for key, path in texts().items() if key not in sections}
    assert {key for key, path in found.items() if path} == PATHS | SIMULATED | ONE_STRATEGY
    unknown = {k for k, path in found.items() if not path and k.rpartition(".")[2] not in NO_PATH}
    assert unknown == set(), "new keys: are they paths? see NO_PATH"


def experiment(*without: str) -> Config:
    """An experiment that names a path wherever it can, but for these keys."""
    raw: dict[str, Any] = {
        "data": {"source": "client_folders", "class_names": ["a", "b"]},
        "partition": {"clients": 3},
        "method": {"name": "fedprox", "base": "promptfl"},
        "clock": {"enabled": True},  # refuses devices without one
        "protocols": ["global", "cross_data_set", "ood"],
        "protocol_options": {
            "cross_data_set": {"targets": [{"use": "eurosat", "root": f"{SECRET}/eurosat"}]},
            "ood": {"out": [{"source": "hub", "hub_id": f"{SECRET}/eurosat"}]},
        },
    }
    config = small_config(**raw)
    for key in PATHS - OF_OTHER_SOURCES - set(without):
        section, _, name = key.partition(".")
        value: Any = f"{SECRET}/{key}"
        change = {name: [value] * 3 if name == "folders" else value}
        part = dataclasses.replace(getattr(config, section), **change)
        config = dataclasses.replace(config, **{section: part})
    return config


def named(value: Any, place: str = "") -> set[str]:
    """Places in plain values where a secret path is named."""
    if isinstance(value, Mapping):
        return {p for k, v in value.items() for p in named(v, f"{place}.{k}")}
    if isinstance(value, (list, tuple)):
        return {p for v in value for p in named(v, place)}
    return {place.removeprefix(".")} if isinstance(value, str) and SECRET in value else set()


def test_a_node_that_lends_a_folder_follows_no_path() -> None:
    config = experiment("data.descriptions")
    expected = PATHS - OF_OTHER_SOURCES - {"data.descriptions"} | {
        "protocol_options.cross_data_set.targets.root", "protocol_options.ood.out.hub_id"
    }  # fmt: skip
    assert named(dataclasses.asdict(config)) == expected, "the test names them all"
    there = on_node(config, NodeSettings(1, "/mine", cache_dir="/cache", checkpoint="/weights.pt"))
    assert named(dataclasses.asdict(there)) == set()
    assert there.data.folders == ["", "/mine", ""]
    assert (there.output.cache, there.backbone.checkpoint) == ("/cache", "/weights.pt")
    assert [t["title"] for t in there.protocol_options["cross_data_set"].targets] == ["eurosat"]


def test_sentences_about_classes_are_shipped_or_refused() -> None:
    """A node without them would silently learn from the templates instead."""
    for config in (experiment("data.descriptions"), whole()):
        node = NodeSettings(1, None if config.data.source == "aerial_scenes" else "/mine",
                            checkpoint="/weights.pt")  # fmt: skip
        for name, known in (("aerial_scenes", True), (f"{SECRET}/sentences.yaml", False)):
            data = dataclasses.replace(config.data, descriptions=name)
            named = dataclasses.replace(config, data=data)
            if known:
                assert on_node(named, node).data.descriptions == name
                continue
            with pytest.raises(UserError, match=r"data\.descriptions") as caught:
                on_node(hidden(named), node)
            assert "aerial_scenes" in str(caught.value)


def test_common_labels_are_shipped_or_refused() -> None:
    """A node of its own labels would train on other classes."""
    data = {"source": "multi", "common_labels": "fedrs", "root": f"{SECRET}/all"}
    node = NodeSettings(1, None, root="/mine")
    plain = small_config(data=data)
    there = on_node(parse(to_yaml(hidden(plain))), node).data
    assert (there.common_labels, there.root) == ("fedrs", "/mine")  # type: ignore[attr-defined]
    own = dataclasses.replace(plain.data, common_labels=f"{SECRET}/labels.yaml")  # type: ignore[call-arg]
    config = parse(to_yaml(hidden(dataclasses.replace(plain, data=own))))
    with pytest.raises(UserError, match=r"data\.common_labels") as caught:
        on_node(config, node)
    assert "rs_five_sources" in str(caught.value)


def test_weights_are_the_nodes_own() -> None:
    with pytest.raises(UserError) as caught:
        on_node(experiment(), NodeSettings(1, "/mine"))
    assert "--checkpoint" in str(caught.value)
    assert SECRET not in str(caught.value)
    plain = experiment("backbone.checkpoint", "data.descriptions")
    assert on_node(plain, NodeSettings(1, "/mine")).backbone.checkpoint is None
    backbone = dataclasses.replace(plain.backbone, model="ViT-B-32", pretrained="openai")
    tagged = dataclasses.replace(plain, backbone=backbone)
    own = on_node(tagged, NodeSettings(1, "/mine", checkpoint="/weights.pt")).backbone
    assert (own.pretrained, own.checkpoint) == ("openai", "/weights.pt")


def test_a_models_folder_is_the_nodes_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = experiment("backbone.checkpoint", "data.descriptions")
    backbone = dataclasses.replace(plain.backbone, model=f"local-dir:{SECRET}/BiomedCLIP")
    config = hidden(dataclasses.replace(plain, backbone=backbone))
    assert config.backbone.model == f"local-dir:{ELSEWHERE}"
    with pytest.raises(UserError, match="--checkpoint FOLDER"):
        on_node(config, NodeSettings(1, "/mine"))
    own = on_node(config, NodeSettings(1, "/mine", checkpoint="/model")).backbone
    assert (own.model, own.checkpoint) == ("local-dir:/model", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    backbone = dataclasses.replace(plain.backbone, model="local-dir:model")
    there = absolute(dataclasses.replace(plain, backbone=backbone))
    assert there.backbone.model == f"local-dir:{tmp_path / 'model'}"


def whole(**data: Any) -> Config:
    """An experiment in which every node opens the whole data set."""
    return small_config(data=data, partition={"clients": 2})


def test_a_node_that_lends_nothing_opens_its_own_copy_only() -> None:
    config = whole(source="folder", root=f"{SECRET}/images")
    assert on_node(config, NodeSettings(1, root="/mine")).data.root == "/mine"
    near = NodeSettings(1, same_machine=True)
    assert on_node(config, near).data.root == f"{SECRET}/images"
    with pytest.raises(UserError, match=r"data\.root") as caught:
        on_node(config, NodeSettings(1))
    assert "--root" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_node_that_lends_nothing_loads_from_the_hub_but_from_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = whole(source="hub", hub_id="user/set")
    assert on_node(config, NodeSettings(1)).data.hub_id == "user/set"
    (tmp_path / "user" / "set").mkdir(parents=True)
    for hub_id in ("user/set", SECRET, "../set", "~/set"):
        with pytest.raises(UserError, match=r"data\.hub_id"):
            on_node(whole(source="hub", hub_id=hub_id), NodeSettings(1))


def test_a_partition_file_of_the_server_is_refused() -> None:
    config = whole()
    partition = dataclasses.replace(config.partition, file=f"{SECRET}/p.json")
    config = dataclasses.replace(config, partition=partition)
    with pytest.raises(UserError, match=r"partition\.file"):
        on_node(config, NodeSettings(1))


def test_other_machines_see_that_a_path_is_set_but_not_which(tmp_path: Path) -> None:
    config = hidden(experiment())
    assert named(dataclasses.asdict(config)) == set()
    assert config.backbone.checkpoint == config.data.root == ELSEWHERE
    valid = hidden(experiment("partition.file"))
    assert parse(to_yaml(valid)) == valid
    with pytest.raises(UserError, match="--checkpoint"):
        on_node(config, NodeSettings(1, "/mine"))
    with pytest.raises(UserError, match=r"data\.root"):
        on_node(hidden(whole(source="folder", root=str(tmp_path))), NodeSettings(1))
    assert hidden(whole(source="hub", hub_id="user/set")).data.hub_id == "user/set"


def test_relative_paths_are_those_of_the_machine_that_hands_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    config = absolute(small_config(data={"source": "folder", "root": "images"}))
    assert config.data.root == str(tmp_path / "images")
    data = HubConfig(hub_id="user/set")
    assert absolute(dataclasses.replace(config, data=data)).data.hub_id == "user/set"
    # No folder for a client, and a text that is too long for a file name.
    folders = ["", "images", "x" * 300]
    config = small_config(
        data={"source": "client_folders", "class_names": ["a", "b"], "folders": folders},
        partition={"clients": 3},
    )
    assert absolute(config).data.folders == ["", str(tmp_path / "images"), "x" * 300]


def test_an_experiment_without_paths_stays_as_it_is() -> None:
    config = small_config()
    plain = without_paths(config)
    assert dataclasses.replace(plain, output=config.output) == config
