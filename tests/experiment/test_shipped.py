"""The shipped config files fit their schemas, and every method and strategy has one."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fedprompt.config.fields import build
from fedprompt.config.schema import SECTIONS, to_dict, to_yaml
from fedprompt.config.shipped import configs_dir
from fedprompt.data import catalogue
from fedprompt.data.sections import available
from fedprompt.data.sources.registry import all_sources
from fedprompt.experiment.compose import GROUPS, compose
from fedprompt.experiment.validate import validate
from fedprompt.federation.registry import all_strategies, strategy_class
from fedprompt.methods.registry import all_methods, method_class
from tests.support.refusals import refused


def shipped(group: str, name: str) -> dict[str, Any]:
    raw = OmegaConf.to_container(OmegaConf.load(configs_dir() / group / f"{name}.yaml"))
    assert isinstance(raw, dict)
    return {str(k): v for k, v in raw.items()}


@pytest.mark.parametrize("group", GROUPS)
def test_every_shipped_file_fits_its_schema(group: str) -> None:
    names = available(group)
    assert names, f"configs/{group} is empty"
    for name in names:
        listed = group == "data" and name in catalogue.names()
        raw = catalogue.data_keys(name) if listed else shipped(group, name)
        if listed:
            raw["root"] = "/images"
        if group == "data" and "root" in raw and raw["root"] is None:
            line = refused(partial(validate, {"data": raw}))
            assert f"source '{raw['source']}' needs 'root'" in line
            raw["root"] = "/images"
        # The default method learns one class per image, and some data sets have several labels.
        beside = {"method": {"name": "promptfl"}} if group == "data" else {}
        config = to_dict(validate({group: raw, **beside}))
        if raw == {"name": "auto"}:
            assert config["strategy"]["name"] == "fedavg"
            continue
        assert {k: config[group][k] for k in raw} == raw, "every key of the file arrives"


@pytest.mark.parametrize("name", available("experiment"))
def test_every_shipped_experiment_composes_and_round_trips(name: str, tmp_path: Path) -> None:
    config = compose(name)
    assert config.experiment == name
    assert validate(to_dict(config)) == config
    kept = tmp_path / "config.yaml"
    kept.write_text(to_yaml(config))
    assert compose(kept) == config


@pytest.mark.parametrize(
    ("group", "registry"), [("method", all_methods()), ("strategy", all_strategies())]
)
def test_every_method_and_strategy_has_a_file_of_its_name(
    group: str, registry: dict[str, Any]
) -> None:
    for variant in set(available(group)) - set(registry):
        assert shipped(group, variant)["name"] in {*registry, "auto"}, f"{variant} is a variant"
    for name, cls in registry.items():
        raw = shipped(group, name)
        assert raw["name"] == name
        assert getattr(validate({group: raw}), group) == build(cls.Config, raw, group)
        assert cls.Config().name == name


@pytest.mark.parametrize("cls", [*all_methods().values(), *all_strategies().values()])
def test_registries_find_by_module(cls: type[Any]) -> None:
    assert cls.__module__.rsplit(".", 1)[-1] == cls.name, "one paper, one file of that name"


def test_unknown_methods_and_strategies_are_refused_with_the_nearest() -> None:
    assert refused(lambda: method_class("fedrsclp")) == (
        "config: no method 'fedrsclp'. Did you mean 'fedrsclip'?"
    )
    assert refused(lambda: strategy_class("fedavgg")) == (
        "config: no strategy 'fedavgg'. Did you mean 'fedavg'?"
    )
    assert "Known: " in refused(lambda: method_class("os.system"))
    assert "Known: " in refused(lambda: strategy_class("fedprompt.strategies.fedavg"))


def test_every_option_has_help() -> None:
    schemas = [*SECTIONS.values(), *(c.Config for c in all_methods().values())]
    schemas += [c.Config for c in all_sources().values()]
    schemas += [c.Config for c in all_strategies().values()]
    for schema in schemas:
        for field in dataclasses.fields(schema):
            assert field.metadata.get("help"), f"{schema.__name__}.{field.name}"


def test_defaults_are_within_their_own_limits() -> None:
    config = validate({})
    assert config == validate(to_dict(config))
    assert config.seed == 1


@pytest.mark.parametrize("name", available("experiment"))
def test_every_shipped_experiment_says_what_it_is_for_and_takes(name: str) -> None:
    text = (configs_dir() / "experiment" / f"{name}.yaml").read_text()
    comment = [line for line in text.splitlines() if line.startswith("#")]
    assert not comment[0].startswith(("#   ", "# Time:")), "its purpose comes first"
    assert any(
        line.startswith((f"#   fedprompt run {name}", f"#   fedprompt sweep {name}"))
        for line in comment
    )
    assert sum(line.startswith("# Time:") for line in comment) == 1
