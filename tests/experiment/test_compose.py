"""How an experiment is composed: shipped files, the user's own file and overrides, in layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from fedprompt.config.fields import build
from fedprompt.config.schema import Config, to_dict, to_yaml
from fedprompt.data.sources.aerial_scenes import AerialScenesConfig
from fedprompt.experiment.compose import compose
from fedprompt.experiment.validate import validate
from fedprompt.methods.registry import method_class


def test_later_wins(write: Callable[..., Path]) -> None:
    path = write("backbone: {use: openai_vit_l14, device: cpu}\ntraining: {lr: 0.5}\n")
    config = compose(path, ["training.lr=0.25", "backbone.device=auto", "training.lr=0.125"])
    assert config.backbone.model == "ViT-L-14", "from the group's file"
    assert config.backbone.image_batch == 32
    assert config.backbone.device == "auto"
    assert config.backbone.precision == "float32", "from the schema"
    assert config.training.lr == 0.125
    assert compose(path).training.lr == 0.5
    assert config.experiment == "mine"


@pytest.mark.parametrize(
    "override",
    [
        "method=promptfl",
        "method.name=promptfl",
        "method.use=promptfl",
        "method={use: promptfl}",
        "method={name: promptfl}",
    ],
)
def test_choosing_a_method_anew_drops_the_keys_of_the_old(
    write: Callable[..., Path], override: str
) -> None:
    path = write("method: {use: fedrsclip, theta: 0.25, context_init: a photo}\n")
    config = compose(path, [override, "method.context_tokens=3"])
    expected = {"name": "promptfl", "context_tokens": 3}
    assert config.method == build(method_class("promptfl").Config, expected, "method")


def test_the_order_of_overrides_does_not_undo_a_choice(base: Path) -> None:
    config = compose(base, ["method.context_tokens=3", "method=promptfl"])
    assert (config.method.name, config.method.context_tokens) == ("promptfl", 3)


def test_plain_keys_change_the_choice_below(write: Callable[..., Path]) -> None:
    write("method: promptfl\nseed: 3\ntraining: {lr: 0.5, momentum: 0.5}\n", "base.yaml")
    config = compose(
        write("extends: base.yaml\nmethod: {context_tokens: 5}\ntraining: {lr: 0.25}\n")
    )
    assert (config.method.name, config.method.context_tokens) == ("promptfl", 5)
    assert (config.seed, config.training.lr, config.training.momentum) == (3, 0.25, 0.5)
    assert config.experiment == "mine"


@pytest.mark.parametrize("choice", ["promptfl", "{use: promptfl}", "{name: promptfl}"])
def test_a_file_that_extends_can_choose_anew(write: Callable[..., Path], choice: str) -> None:
    write("method: {use: fedrsclip, theta: 0.25}\n", "base.yaml")
    config = compose(write(f"extends: base.yaml\nmethod: {choice}\n"))
    assert config.method.name == "promptfl"


def test_extends_is_relative_to_the_file(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("seed: 5\n", "base.yaml")
    write("extends: base.yaml\nexperiment: middle\n", "middle.yaml")
    path = write("extends: middle.yaml\n", "top.yaml")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert (compose(path).seed, compose(path).experiment) == (5, "top")
    assert compose(tmp_path / "middle.yaml").experiment == "middle"


def test_a_shipped_experiment_can_be_extended(write: Callable[..., Path]) -> None:
    config = compose(write("extends: quickstart\nfederation: {rounds: 3}\n"))
    shipped = to_dict(compose("quickstart"))
    shipped["federation"]["rounds"] = 3
    assert to_dict(config) == {**shipped, "experiment": "mine"}


@pytest.mark.parametrize(
    ("override", "section", "key", "expected"),
    [
        ("federation.rounds=7", "federation", "rounds", 7),
        ("federation.rounds = 7", "federation", "rounds", 7),
        ("federation={rounds: 7}", "federation", "rounds", 7),
        ("training.lr=1", "training", "lr", 1.0),
        ("training.lr=1e-4", "training", "lr", 1e-4),
        ("partition.shots=16", "partition", "shots", 16),
        ("partition.shots=null", "partition", "shots", None),
        ("evaluation.local_only=false", "evaluation", "local_only", False),
        ("output.dir=~/my runs/a=b", "output", "dir", "~/my runs/a=b"),
        ("data.class_names=[a b, c]", "data", "class_names", ["a b", "c"]),
        ('data.templates=["one {}.", "two {}."]', "data", "templates", ["one {}.", "two {}."]),
        ("data.title=2024", "data", "title", "2024"),
    ],
)
def test_overrides_are_typed(
    base: Path, override: str, section: str, key: str, expected: object
) -> None:
    value = getattr(getattr(compose(base, [override]), section), key)
    assert value == expected
    assert type(value) is type(expected)


def test_a_section_override_keeps_the_other_keys(write: Callable[..., Path]) -> None:
    path = write("federation: {fraction: 0.5}\n")
    config = compose(path, ["federation={rounds: 7}"])
    assert (config.federation.rounds, config.federation.fraction) == (7, 0.5)


def test_a_section_may_be_left_empty(write: Callable[..., Path]) -> None:
    assert compose(write("training:\nmethod:\n")) == validate({"experiment": "mine"})


@pytest.mark.parametrize("words", ["no", "1e3", "null", "a: b # c", "'", "{}", "ä ☃", " x "])
def test_awkward_texts_round_trip(words: str, tmp_path: Path) -> None:
    config = validate({"data": {"class_names": [words, "b"], "title": words}})
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert compose(path) == config


@pytest.mark.parametrize("lr", [1e-05, 0.1 + 0.2, 1e22, 5e-324])
def test_numbers_round_trip_bit_for_bit(lr: float, tmp_path: Path) -> None:
    config = validate({"training": {"lr": lr}, "seed": 10**18 - 1})
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert compose(path) == config
    assert compose(path).training.lr == lr


def test_a_kept_config_can_be_overridden(base: Path, tmp_path: Path) -> None:
    config = compose(base, ["method.theta=0.25"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert compose(path, ["seed=9"]) == dataclasses.replace(config, seed=9)
    assert compose(path, ["method.theta=0.5"]).method.theta == 0.5
    assert compose(path, ["method=zero_shot"]).method.name == "zero_shot"


def test_the_config_is_frozen(base: Path) -> None:
    config = compose(base)
    for part in (config, *(getattr(config, f.name) for f in dataclasses.fields(Config))):
        if dataclasses.is_dataclass(part):
            name = dataclasses.fields(part)[0].name
            with pytest.raises(FrozenInstanceError):
                setattr(part, name, "other")
    for schema in (compose(base).data, AerialScenesConfig()):
        schema.templates.append("another {}.")
    assert compose(base).data == config.data == AerialScenesConfig(), "no default is shared"


def test_two_sources_of_weights_are_one_file_with_a_tags_settings() -> None:
    raw = {"model": "ViT-B-16", "pretrained": "openai", "checkpoint": "weights.pt"}
    assert validate({"backbone": raw}).backbone.pretrained == "openai"
