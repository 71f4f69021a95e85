"""The typed experiment config: schema, composition, overrides, checks.

Order, later wins: schema defaults < `configs/<group>/<name>.yaml` < the experiment file <
`key=value` overrides. The result is frozen. A run folder's `config.yaml` is complete and composes
to the same config again.

In an experiment file a group is a name (`method: promptfl`), a name with changes
(`method: {use: promptfl, context_tokens: 4}`) or plain keys. `extends:` names a shipped experiment
or a YAML file beside it; choosing a group anew drops the keys of the old choice, while plain keys
change it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedprompt.errors import UserError, did_you_mean
from fedprompt.options import build
from fedprompt.schema import (
    AttackConfig,
    BackboneConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    FederationConfig,
    GridConfig,
    OutputConfig,
    PartitionConfig,
    PrivacyConfig,
    SecureAggregationConfig,
    TrainingConfig,
)

SECTIONS: dict[str, type[Any]] = {
    "backbone": BackboneConfig,
    "data": DataConfig,
    "partition": PartitionConfig,
    "training": TrainingConfig,
    "federation": FederationConfig,
    "grid": GridConfig,
    "evaluation": EvaluationConfig,
    "attack": AttackConfig,
    "privacy": PrivacyConfig,
    "secure_aggregation": SecureAggregationConfig,
    "output": OutputConfig,
}
GROUPS = ("backbone", "data", "method", "strategy")
TOP_LEVEL = (
    "experiment", "seed", "method", "strategy", *SECTIONS, "protocols", "protocol_options"
)  # fmt: skip


def configs_dir() -> Path:
    """The shipped configs: inside the installed package, else beside it in a checkout."""
    here = Path(__file__).parent
    inside = here / "configs"
    return inside if inside.is_dir() else here.parent / "configs"


def available(group: str) -> list[str]:
    """Names that one group may be set to, e.g. `available("experiment")`.

    They are the shipped config files; for `data` also the entries of the catalogue.
    """
    files = [p.stem for p in (configs_dir() / group).glob("*.yaml")]
    return sorted(files + (_catalogue().names() if group == "data" else []))


def compose(experiment: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config for a shipped experiment name or a YAML file, with `key=value` overrides.

    Raises:
        UserError: missing file, unknown key, wrong type or impossible value.
    """
    raw = _load_experiment(str(experiment))
    changes = [_parse_override(item) for item in overrides]
    chosen = [(path[0], value) for path, value in changes if _selects_group(path)]
    for group, value in chosen:
        raw = _layer(raw, {group: value})
    for group in GROUPS:
        raw[group] = _resolve_group(group, raw.get(group))
    for path, value in changes:
        if not _selects_group(path):
            _assign(raw, path, value)
    return validate(raw)


def parse(text: str) -> Config:
    """The config that `to_yaml` wrote; data only, no file is read.

    Raises:
        UserError: not such a text, or what `validate` refuses.
    """
    try:
        raw = OmegaConf.to_container(OmegaConf.create(text))
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise UserError(f"config: this is not valid YAML: {_one_line(error)}.") from None
    if not isinstance(raw, dict):
        raise UserError("config: it must hold 'key: value' lines.")
    return validate({str(key): value for key, value in raw.items()})


def validate(raw: Mapping[str, Any]) -> Config:
    """A frozen `Config` from plain nested dicts; raises `UserError` as `compose` does."""
    from fedprompt import protocols
    from fedprompt.methods import method_class
    from fedprompt.secure_aggregation.terms import check_config
    from strategies import strategy_class

    for key in raw:
        if key not in TOP_LEVEL:
            hint = did_you_mean(str(key), TOP_LEVEL)
            raise UserError(f"config: unknown key {str(key)!r}.{hint}")
    parts: dict[str, Any] = {}
    for name, schema in SECTIONS.items():
        parts[name] = build(schema, _mapping(name, raw.get(name)), name)
    method = dict(_mapping("method", raw.get("method")))
    cls = method_class(str(method.get("name", "fedrsclip")))
    parts["method"] = build(cls.Config, method, "method")
    strategy = dict(_mapping("strategy", raw.get("strategy")))
    if strategy.get("name", "auto") == "auto":
        strategy = {**strategy, **cls.server_rule(parts["method"])}
    rule = str(strategy["name"])
    parts["strategy"] = build(strategy_class(rule).Config, strategy, "strategy")
    possible = cls.possible_rules(parts["method"])
    if possible is not None and rule not in possible:
        raise UserError(
            f"config: method '{cls.name}' cannot do without strategy "
            f"{' or '.join(sorted(possible))}; leave strategy out, or set strategy=auto."
        )
    seed = raw.get("seed", 1)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(f"config: seed is {seed!r}; it must be a whole number, 0 or more.")
    experiment = raw.get("experiment", "experiment")
    if not isinstance(experiment, str) or not re.fullmatch(r"\w[\w .+-]*", experiment):
        raise UserError(
            f"config: experiment is {experiment!r}; it names the run folder: use letters, digits, "
            "'-', '_', '.'."
        )
    parts["protocols"], parts["protocol_options"] = protocols.build_options(
        raw.get("protocols", protocols.DEFAULT), raw.get("protocol_options")
    )
    config = Config(experiment=experiment, seed=seed, **parts)
    protocols.who_holds_out(protocols.open_protocols(config))
    _check_client_folders(config)
    check_config(config)
    return config


def _check_client_folders(config: Config) -> None:
    """Folders decide who holds what: there is one for each client, and no partition file."""
    if config.data.source != "client_folders":
        return
    folders, clients = len(config.data.folders), config.partition.clients
    if folders not in (0, clients):
        raise UserError(
            f"config: data.folders has {folders} folders for partition.clients={clients}; give "
            "one for each client, or none where they are on the nodes."
        )
    if config.partition.file is not None:
        raise UserError("config: data.source=client_folders leaves nothing for partition.file.")


def data_config(chosen: Any, where: str) -> DataConfig:
    """The data set that a name, or a mapping as in an experiment file, stands for.

    Raises:
        UserError: unknown name or wrong keys; `where` is the key's path for the message.
    """
    return build(DataConfig, _resolve_group("data", chosen), where)


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain nested dicts, complete: `validate(to_dict(c)) == c`."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The config as YAML, complete; what a run folder's `config.yaml` holds."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def _catalogue() -> ModuleType:
    """The catalogue of data sets; imported late, since most commands do without it."""
    from fedprompt.data import catalogue

    return catalogue


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise UserError(f"config: cannot read {path}: {error.strerror}.") from None
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise UserError(f"config: {path} is not valid YAML: {_one_line(error)}.") from None
    if not isinstance(loaded, dict):
        raise UserError(f"config: {path} must hold 'key: value' lines.")
    return {str(k): v for k, v in loaded.items()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _load_experiment(
    experiment: str, folder: Path | None = None, seen: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """The file's keys over those that it extends; `folder` is where relative paths start."""
    if experiment.endswith((".yaml", ".yml")):
        path = (folder or Path()) / Path(experiment).expanduser()
        if not path.is_file():
            raise UserError(f"config: no file {path}.")
    else:
        path = _shipped("experiment", experiment)
    if path.resolve() in seen:
        raise UserError(f"config: {path} extends itself.")
    raw = _load_yaml(path)
    raw.setdefault("experiment", path.stem)
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise UserError(f"config: {path}: 'extends' must name one experiment, got {base!r}.")
    return _layer(_load_experiment(base, path.parent, (*seen, path.resolve())), raw)


def _shipped(group: str, name: Any) -> Path:
    """The shipped file of that name: names select, paths do not."""
    known = available(group)
    if name not in known:
        hint = did_you_mean(str(name), known)
        raise UserError(f"config: no {group} {str(name)!r}.{hint}")
    return configs_dir() / group / f"{name}.yaml"


def _layer(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` over `base`; a group that `top` chooses anew replaces the old choice and its keys."""
    below = dict(base)
    for group in GROUPS:
        new, old = top.get(group), below.get(group)
        chooses = not isinstance(new, Mapping) or "use" in new or "name" in new
        if new is not None and chooses:
            below.pop(group, None)
        elif isinstance(old, str):
            below[group] = {"use": old}
    return _merge(below, top)


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    return {**base, **{key: _over(base.get(key), value) for key, value in top.items()}}


def _over(old: Any, new: Any) -> Any:
    both = isinstance(old, Mapping) and isinstance(new, Mapping)
    return _merge(old, new) if both else new


def _resolve_group(group: str, value: Any) -> dict[str, Any]:
    """A group's mapping: a name selects a shipped file or entry; `use:` does, then adds."""
    if value is None:
        return {}
    extra: dict[str, Any] = {}
    if isinstance(value, Mapping):
        extra = {str(k): v for k, v in value.items()}
        if "use" not in extra:
            return extra
        value = extra.pop("use")
    if group == "data" and value in _catalogue().names():
        return _merge(_catalogue().data_keys(value), extra)
    return _merge(_load_yaml(_shipped(group, value)), extra)


def _selects_group(path: Sequence[str]) -> bool:
    """Whether an override key chooses a group anew: `method=...`, `method.name=...`."""
    return path[0] in GROUPS and (len(path) == 1 or list(path[1:]) in (["use"], ["name"]))


def _parse_override(item: str) -> tuple[list[str], Any]:
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise UserError(f"config: {item!r} is not key=value, e.g. federation.rounds=20.")
    path = key.strip().split(".")
    if path[0] not in TOP_LEVEL:
        raise UserError(f"config: unknown key {key.strip()!r}.{_nearest_key(key.strip())}")
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except Exception as error:  # OmegaConf's and PyYAML's errors have no common public parent
        raise UserError(f"config: cannot read {item!r}: {_one_line(error)}.") from None
    if parsed["value"] is None and _selects_group(path):
        raise UserError(f"config: {item!r} has no value.")
    return path, parsed["value"]


def _nearest_key(key: str) -> str:
    """A hint; a key that was given without its section gets it."""
    whole = [
        f"{name}.{field.name}"
        for name, schema in SECTIONS.items()
        for field in dataclasses.fields(schema)
    ]
    close = [known for known in whole if known.partition(".")[2] == key]
    close = close or get_close_matches(key, whole, n=1, cutoff=0.8)
    return f" Did you mean '{close[0]}'?" if close else did_you_mean(key.split(".")[0], TOP_LEVEL)


def _assign(raw: dict[str, Any], path: Sequence[str], value: Any) -> None:
    node = raw
    for part in path[:-1]:
        child = node.get(part)
        if child is None:
            child = {}
        if not isinstance(child, dict):
            raise UserError(f"config: {'.'.join(path)!r}: {part!r} has no keys of its own.")
        node[part] = child
        node = child
    node[path[-1]] = _over(node.get(path[-1]), value)


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"config: '{name}' must hold keys, got {value!r}.")
    return value
