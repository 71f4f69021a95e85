from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fedprompt.config.fields import build, option
from fedprompt.config.schema import SECTIONS, Config, to_dict, to_yaml
from fedprompt.config.shipped import configs_dir
from fedprompt.data import catalogue
from fedprompt.data.sections import available
from fedprompt.data.sources.aerial_scenes import AerialScenesConfig
from fedprompt.data.sources.registry import all_sources
from fedprompt.errors import UserError
from fedprompt.experiment.compose import GROUPS, compose
from fedprompt.experiment.validate import validate
from fedprompt.federation.registry import all_strategies, strategy_class
from fedprompt.methods.registry import all_methods, method_class

BASE = "backbone: tiny\nmethod: fedrsclip\nstrategy: fedavg\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes an experiment file and returns its path."""

    def make(text: str | bytes, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


@pytest.fixture
def base(write: Callable[..., Path]) -> Path:
    return write(BASE, "base.yaml")


def shipped(group: str, name: str) -> dict[str, Any]:
    raw = OmegaConf.to_container(OmegaConf.load(configs_dir() / group / f"{name}.yaml"))
    assert isinstance(raw, dict)
    return {str(k): v for k, v in raw.items()}


def refused(call: Callable[[], Any]) -> str:
    """The one line that `call` is refused with."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert line.isprintable(), f"more than one plain line: {line!r}"
    assert line == line.strip()
    for foreign in ("Traceback", "Error(", "<class", "object at 0x", "omegaconf", "full_key"):
        assert foreign not in line
    return line


# What is shipped


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
        config = to_dict(validate({group: raw}))
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


# Composition


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
    config = validate({"training": {"lr": lr}, "seed": 2**64})
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


# Refusals

REFUSED_OVERRIDES = {
    # misspelt keys name the nearest
    "training.optimiser=sgd": "unknown key 'training.optimiser'. Did you mean 'optimizer'?",
    "trainin.lr=1": "unknown key 'trainin.lr'. Did you mean 'training.lr'?",
    "sed=1": "unknown key 'sed'. Did you mean 'seed'?",
    "rounds=3": "unknown key 'rounds'. Did you mean 'federation.rounds'?",
    "federatoin.rouns=3": "unknown key 'federatoin.rouns'. Did you mean 'federation.rounds'?",
    "training.optimizer=sgdd": "training.optimizer is 'sgdd'; it must be one of sgd, adam, adamw. "
    "Did you mean 'sgd'?",
    "method.tetha=0.5": "unknown key 'method.tetha'. Did you mean 'theta'?",
    "strategy.max_nrm=1": "unknown key 'strategy.max_nrm'. Did you mean 'max_norm'?",
    "backbone.presicion=bf16": "unknown key 'backbone.presicion'. Did you mean 'precision'?",
    "method.context_tokens=4": "unknown key 'method.context_tokens'.",
    "federation[rounds]=4": "unknown key 'federation[rounds]'. Did you mean 'federation.rounds'?",
    "federation..rounds=4": "unknown key 'federation.'.",
    "a..b=1": "unknown key 'a..b'. Known: ",
    # wrong types
    "federation.rounds=ten": "federation.rounds is 'ten'; it must be a whole number.",
    "federation.rounds=2.5": "federation.rounds is 2.5; it must be a whole number.",
    "federation.rounds=true": "federation.rounds is True; it must be a whole number.",
    "federation.rounds=[1]": "federation.rounds is [1]; it must be a whole number.",
    "federation.rounds=": "federation.rounds is None; it must be a whole number.",
    "federation.rounds.x=5": "federation.rounds is {'x': 5}; it must be a whole number.",
    "federation.rounds=5\nseed=3": "federation.rounds is '5 seed=3'; it must be a whole number.",
    "training.lr=fast": "training.lr is 'fast'; it must be a number.",
    "training.lr=true": "training.lr is True; it must be a number.",
    "evaluation.local_only=maybe": "evaluation.local_only is 'maybe'; it must be true or false.",
    "data.title=null": "data.title is None; it must be text.",
    "data.templates=x": "data.templates is 'x'; it must be a list of texts.",
    "data.class_names={a: b}": "data.class_names is {'a': 'b'}; it must be a list of texts.",
    "partition.shots=few": "partition.shots is 'few'; it must be a whole number or null.",
    "simulation.kind=slurm": "simulation.kind is 'slurm'; it must be one of inline, ray.",
    "method.dpa=l2": "method.dpa is 'l2'; it must be one of none, cosine, mse, kl, contrastive.",
    "federation=5": "'federation' must hold keys, got 5.",
    "federation=[1]": "'federation' must hold keys, got [1].",
    "backbone.model.x=1": "'backbone.model.x': 'model' has no keys of its own.",
    "seed.x=1": "seed is {'x': 1}; it must be a whole number, 0 or more.",
    # out of range
    "federation.fraction=0": "federation.fraction is 0.0; it must be greater than 0.",
    "federation.fraction=1.01": "federation.fraction is 1.01; it must be at most 1.",
    "training.momentum=1": "training.momentum is 1.0; it must be less than 1.",
    "federation.rounds=-1": "federation.rounds is -1; it must be at least 0.",
    "partition.shots=0": "partition.shots is 0; it must be at least 1.",
    "method.theta=2": "method.theta is 2.0; it must be at most 1.",
    "training.lr=nan": "training.lr is nan; it must be a finite number.",
    'training.lr="nan"': "training.lr is nan; it must be a finite number.",
    "training.lr=.inf": "training.lr is inf; it must be a finite number.",
    "federation.timeout_s=inf": "federation.timeout_s is inf; it must be a finite number.",
    "seed=-1": "seed is -1; it must be a whole number, 0 or more.",
    "seed=1.5": "seed is 1.5; it must be a whole number, 0 or more.",
    "seed=true": "seed is True; it must be a whole number, 0 or more.",
    # no key=value, no YAML
    "federation.rounds": "'federation.rounds' is not key=value, e.g. federation.rounds=20.",
    "--seed 3": "'--seed 3' is not key=value",
    "=3": "'=3' is not key=value",
    "": "'' is not key=value",
    "training.lr=[": "cannot read 'training.lr=[': ",
    "training.lr={a": "cannot read 'training.lr={a': ",
    # names select, paths do not
    "method=fedrsclp": "no method 'fedrsclp'. Did you mean 'fedrsclip'?",
    "method=": "'method=' has no value.",
    "method=5": "no method '5'. Known: ",
    "method=[promptfl]": "no method \"['promptfl']\".",
    "strategy=fedavgg": "no strategy 'fedavgg'. Did you mean 'fedavg'?",
    "backbone=openai_vitb16": "no backbone 'openai_vitb16'. Did you mean 'openai_vit_b16'?",
    "data=cifar": "no data 'cifar'.",
    "method=../strategy/fedavg": "no method '../strategy/fedavg'. ",
    "data=/etc/hostname": "no data '/etc/hostname'. ",
    "experiment=../../etc": "experiment is '../../etc'; it names the run folder",
    "experiment=a/b": "experiment is 'a/b'; it names the run folder",
    "experiment=": "experiment is None; it names the run folder",
    # nothing is filled in behind the user's back
    "output.root=${oc.env:HOME}": "output.root is '${oc.env:HOME}'; write the value itself.",
    "training.lr=${seed}": "training.lr is '${seed}'; write the value itself.",
    "training.lr=???": "training.lr is '???'; write the value itself.",
    'data.templates=["a ${x} {}"]': "data.templates is 'a ${x} {}'; write the value itself.",
    # combinations without meaning
    "backbone.model=ViT-B-16": "backbone: 'ViT-B-16' needs weights: set backbone.pretrained",
    "data.source=hub": "data: source 'hub' needs 'hub_id'.",
    "data.templates=[a photo]": "data: template 'a photo' must contain {} exactly once.",
    "data.templates=[]": "data: 'templates' is empty",
    "method.prompts=shared": "method: 'dpa' aligns two prompts",
}


@pytest.mark.parametrize("override", REFUSED_OVERRIDES)
def test_a_bad_override_is_one_line(base: Path, override: str) -> None:
    line = refused(lambda: compose(base, [override]))
    assert line.startswith("config: ")
    assert line.removeprefix("config: ").startswith(REFUSED_OVERRIDES[override])


REFUSED_FILES: dict[str, str | bytes] = {
    "not valid YAML: while parsing": "training: [1,\n",
    "not valid YAML: mapping values": "training:\tlr: 1\n",
    "found duplicate key seed": "seed: 1\nseed: 2\n",
    "could not determine a constructor": "x: !!python/object/apply:os.getcwd []\n",
    "can't decode byte": b"\xff\xfe\x00",
    "control characters are not allowed": b"seed: \x00",
    "must hold 'key: value' lines": "- seed\n- 1\n",
    "unknown key 'experimnt'. Did you mean 'experiment'?": "experimnt: x\n",
    "unknown key '1'": "1: 2\n",
    r"unknown key 'new\nline'": '"new\\nline": 2\n',
    "unknown key 'training.1'": "training: {1: 2}\n",
    "'training' must hold keys, got 3": "training: 3\n",
    "mine.yaml extends itself": "extends: mine.yaml\n",
    "'extends' must name one experiment, got ['a']": "extends: [a]\n",
    "no experiment 'quickstar'. Did you mean 'quickstart'?": "extends: quickstar\n",
    "no file": "extends: nowhere.yaml\n",
    "no method 'None'": "method: {use: }\n",
    "backbone.device is 'tpu'; it must be one of auto, cpu, cuda": (
        "backbone: {use: tiny, device: tpu}\n"
    ),
    "training.lr is '${seed}'": "training: {lr: '${seed}'}\n",
    "seed is '${x}'": "seed: ${x}\n",
}


@pytest.mark.parametrize("match", REFUSED_FILES)
def test_a_bad_file_is_one_line(write: Callable[..., Path], match: str) -> None:
    path = write(REFUSED_FILES[match])
    assert match in refused(lambda: compose(path))


def test_files_that_extend_each_other_are_refused(write: Callable[..., Path]) -> None:
    write("extends: b.yaml\n", "a.yaml")
    write("extends: a.yaml\n", "b.yaml")
    assert "extends itself" in refused(lambda: compose(write("extends: a.yaml\n")))


def test_missing_experiments_are_refused(tmp_path: Path) -> None:
    assert refused(lambda: compose("quickstar")) == (
        "config: no experiment 'quickstar'. Did you mean 'quickstart'?"
    )
    assert refused(lambda: compose("../method/promptfl")).startswith("config: no experiment '../")
    assert refused(lambda: compose("")).startswith("config: no experiment ''. Known: ")
    assert refused(lambda: compose(tmp_path / "x.yaml")) == f"config: no file {tmp_path}/x.yaml."
    (tmp_path / "folder.yaml").mkdir()
    assert "no file" in refused(lambda: compose(tmp_path / "folder.yaml"))


def test_a_file_that_cannot_be_read_is_one_line(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fedprompt.experiment.compose.OmegaConf.load", denied)
    assert refused(lambda: compose(base)) == f"config: cannot read {base}: Permission denied."


def test_two_sources_of_weights_are_one_file_with_a_tags_settings() -> None:
    raw = {"model": "ViT-B-16", "pretrained": "openai", "checkpoint": "weights.pt"}
    assert validate({"backbone": raw}).backbone.pretrained == "openai"


# Options by themselves


@dataclass(frozen=True)
class Limits:
    """One field per limit."""

    count: int = option(5, "a count", ge=1, le=9)
    share: float = option(0.5, "a share", gt=0, lt=1)
    maybe: float | None = option(None, "a number or nothing", gt=0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"count": 1}, None),
        ({"count": 9}, None),
        ({"count": 0}, "at least 1"),
        ({"count": 10}, "at most 9"),
        ({"share": 0.999}, None),
        ({"share": 0.0}, "greater than 0"),
        ({"share": 1}, "less than 1"),
        ({"share": -1e-9}, "greater than 0"),
        ({"maybe": None}, None),
        ({"maybe": 0}, "greater than 0"),
        ({"maybe": "much"}, "a number or null"),
    ],
)
def test_limits(values: dict[str, Any], words: str | None) -> None:
    if words is None:
        assert dataclasses.asdict(build(Limits, values, "x")).items() >= values.items()
    else:
        (key,) = values
        line = refused(lambda: build(Limits, values, "x"))
        assert line.startswith(f"config: x.{key} is ")
        assert line.endswith(f"it must be {words}.")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("grid.kind=ray", "'grid.kind' is now 'simulation.kind'"),
        ("grid.cohort_size=4", "'grid.cohort_size' is now 'simulation.clients_per_block'"),
        ("simulation.cohort_timeout_s=9", "is now 'simulation.block_timeout_s'"),
    ],
)
def test_an_old_key_is_refused_with_its_new_name(old: str, new: str) -> None:
    assert new in refused(lambda: compose("quickstart", [old]))


def test_an_old_section_in_a_file_is_refused_with_its_new_name(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("extends: quickstart\ngrid: {threads: 1}\n")
    assert "'grid' is now 'simulation'" in refused(lambda: compose(path))
