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
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedprompt.errors import UserError, did_you_mean
from fedprompt.options import build, option


@dataclass(frozen=True)
class BackboneConfig:
    """Which CLIP, where it runs and how precisely."""

    model: str = option("tiny", "open_clip model name, or 'tiny' for the embedded one")
    pretrained: str | None = option(None, "open_clip pretrained tag, e.g. 'openai'")
    checkpoint: str | None = option(
        None, "local weights (.safetensors or .pt); beside a tag, whose settings then hold"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto takes a GPU when there is one")
    precision: Literal["float32", "bf16"] = option("float32", "bf16 = autocast to bfloat16")
    image_batch: int = option(64, "images encoded at once when features are cached", ge=1)

    def check(self) -> None:
        """Refuse a model without weights."""
        if self.model != "tiny" and not (self.pretrained or self.checkpoint):
            raise UserError(
                f"'{self.model}' needs weights: set backbone.pretrained (a tag) or "
                "backbone.checkpoint (a local file)."
            )


@dataclass(frozen=True)
class DataConfig:
    """Where images and class names come from."""

    source: Literal["aerial_scenes", "folder", "hub", "catalogue", "multi"] = option(
        "aerial_scenes", "kind of data set"
    )
    title: str = option("aerial_scenes", "name used in tables, plots and the cache")
    templates: list[str] = option(["a photo of a {}."], "zero-shot templates; {} = class name")
    class_names: list[str] = option([], "class names in label order; empty = from the data set")
    test_fraction: float = option(
        0.25, "server test share where the data set has no official test split", gt=0, lt=1
    )
    views: int = option(
        1, "views per training image: the plain one and views - 1 random crops, perhaps mirrored",
        ge=1, le=64,
    )  # fmt: skip
    crop_scale: float = option(0.08, "views: smallest share of an image in a crop", gt=0, le=1)
    on_bad_image: Literal["error", "skip"] = option("error", "what to do with unreadable images")
    # source: folder
    root: str | None = option(
        None, "folder: root/class/*.jpg or root/{train,test}/class/*.jpg; catalogue: the authors'"
    )
    # source: catalogue
    dataset: str | None = option(None, "catalogue: name of the entry; root null = from the hub")
    split: Literal["auto", "coop", "official"] = option(
        "auto", "catalogue: auto = CoOp's split file where it lies beside the images, else official"
    )
    validation: Literal["unused", "train"] = option(
        "unused", "catalogue folders: what to do with the validation images of a split"
    )
    # source: multi
    common_labels: str | None = option(
        None, "multi: a list of data sets and their common labels; root/<data set> or the hub"
    )
    # source: hub
    hub_id: str | None = option(None, "Hugging Face data set id, or a local data set folder")
    hub_config: str | None = option(None, "Hugging Face config name")
    hub_revision: str | None = option(None, "Hugging Face revision (pin it for exact reruns)")
    train_split: str | None = option("train", "hub split to train on; null = a set only for tests")
    test_split: str | None = option(None, "hub split to test on; null = hold out test_fraction")
    image_column: str = option("image", "hub column with images")
    label_column: str = option("label", "hub column with labels")
    domain_column: str | None = option(None, "hub column with the domain of an image")
    domains: list[str] = option([], "domains to use; empty = all (aerial_scenes: all federated)")
    # source: aerial_scenes
    images_per_class: int = option(60, "aerial_scenes: images per class and domain", ge=2)

    def check(self) -> None:
        """Each source needs its own keys."""
        if self.source == "folder" and not self.root:
            raise UserError("source 'folder' needs 'root', e.g. data.root=/path/to/images.")
        if self.source == "hub" and not self.hub_id:
            raise UserError("source 'hub' needs 'hub_id'.")
        if self.source == "catalogue":
            self._check_catalogue()
        if self.source == "multi":
            self._check_multi()
        if self.train_split is None and self.test_split is None:
            raise UserError("'train_split' and 'test_split' are both null; nothing is left.")
        for template in self.templates:
            if template.count("{}") != 1:
                raise UserError(f"template '{template}' must contain {{}} exactly once.")
        if not self.templates:
            raise UserError("'templates' is empty; give at least one, e.g. 'a photo of a {}.'.")

    def _check_catalogue(self) -> None:
        if self.dataset is None:
            raise UserError("source 'catalogue' needs 'dataset', a name of 'fedprompt data list'.")
        entry = _catalogue().entry(self.dataset)
        if not (self.root or self.hub_id):
            raise UserError(
                f"no copy of {self.dataset} on the hub is known; download {entry.download} from "
                f"{entry.homepage}, unpack it and set data.root to the folder."
            )

    def _check_multi(self) -> None:
        from fedprompt.data import multi  # it needs this module

        if self.common_labels is None:
            raise UserError(f"source 'multi' needs 'common_labels': {', '.join(multi.names())}.")
        multi.common_labels(self.common_labels)


@dataclass(frozen=True)
class PartitionConfig:
    """How training images are dealt to clients."""

    clients: int = option(10, "number of clients K", ge=1)
    scheme: Literal[
        "iid",
        "dirichlet",
        "pathological",
        "shards",
        "disjoint_classes",
        "quantity",
        "power_law",
        "domain",
        "domain_dirichlet",
        "superclass_dirichlet",
    ] = option("dirichlet", "rule that deals images to clients")
    alpha: float = option(0.1, "dirichlet, quantity: concentration; small = strongly non-IID", gt=0)
    alpha_within: float = option(
        10.0, "superclass_dirichlet: concentration of classes within a superclass", gt=0
    )
    classes_per_client: int = option(2, "pathological: classes per client", ge=1)
    shards_per_client: int = option(2, "shards: runs of class-sorted images per client", ge=1)
    exponent: float = option(1.0, "power_law: the r-th largest client has r^-exponent", ge=0)
    domain_clients: Literal["equal", "proportional"] = option(
        "equal", "domain schemes: clients per domain; proportional = to its training images"
    )
    shots: int | None = option(None, "few-shot: training images per class and client", ge=1)
    min_images: int = option(2, "fewest images a client may hold", ge=1)
    local_test_fraction: float = option(
        0.25, "share of a client's images kept for its own test", ge=0, lt=1
    )
    unlabelled_clients: int = option(
        0, "clients, drawn at random, whose training images have no labels: they never train", ge=0
    )
    file: str | None = option(
        None, "a partition file that takes the place of the scheme and of the keys that shape it"
    )

    def check(self) -> None:
        """Somebody must have labels."""
        if self.unlabelled_clients >= self.clients:
            raise UserError(
                f"'unlabelled_clients' is {self.unlabelled_clients} of {self.clients} clients; at "
                "least one must have labels."
            )


@dataclass(frozen=True)
class TrainingConfig:
    """Local training on a client."""

    optimizer: Literal["sgd", "adamw"] = option("sgd", "local optimiser")
    lr: float = option(0.002, "learning rate in round 1", gt=0)
    momentum: float = option(0.9, "SGD momentum", ge=0, lt=1)
    weight_decay: float = option(5e-4, "weight decay", ge=0)
    schedule: Literal["cosine", "constant"] = option("cosine", "learning rate over rounds")
    local_epochs: int = option(1, "passes over the local images per round", ge=1)
    batch_size: int = option(32, "images per step", ge=1)


@dataclass(frozen=True)
class FederationConfig:
    """Rounds and participation."""

    rounds: int = option(10, "communication rounds", ge=0)
    fraction: float = option(1.0, "share of clients that train in a round", gt=0, le=1)
    min_replies: int = option(1, "fewest valid replies for a round to count", ge=1)
    timeout_s: float = option(3600.0, "longest wait for replies, seconds", gt=0)
    node_wait_s: float = option(300.0, "longest wait for nodes to join, seconds", gt=0)


@dataclass(frozen=True)
class GridConfig:
    """Where client messages run in a simulation."""

    kind: Literal["inline", "ray"] = option("inline", "inline = this process; ray = Ray actors")
    cohort_size: int = option(0, "clients trained in one call; 0 = chosen from the sizes", ge=0)
    threads: int = option(0, "CPU threads per process; 0 = all (inline) or cpus_per_worker", ge=0)
    workers: int = option(2, "ray: number of actors", ge=1)
    cpus_per_worker: float = option(1.0, "ray: CPUs of one actor", gt=0)
    gpus_per_worker: float = option(0.0, "ray: GPUs of one actor; fractions share a GPU", ge=0)
    ray_address: str | None = option(None, "ray: cluster to join, e.g. 'auto' or 'host:6379'")
    cohort_timeout_s: float = option(1800.0, "ray: time limit of one cohort, seconds", gt=0)
    retries: int = option(2, "ray: tries after a worker died", ge=0)


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured and when; the last round is what is reported."""

    every: int = option(1, "evaluate every n rounds, and at the end", ge=1)
    clients: Literal["all", "participants"] = option(
        "all", "personal tests: all, or those who trained in the round and all at the end"
    )
    local_only: bool = option(True, "also train every client alone for as many rounds")
    local_only_tokens: int = option(4, "context tokens of that local-only CoOp", ge=1)
    personal_on_global: bool = option(True, "also test personal models on the server test set")


@dataclass(frozen=True)
class OutputConfig:
    """Where results go."""

    root: str = option("runs", "folder that holds run folders")
    dir: str | None = option(None, "run folder; null = root/<experiment>-<method>-seed<seed>")
    checkpoint_every: int = option(1, "rounds between checkpoints", ge=1)
    cache: str | None = option(None, "feature cache; null = $FEDPROMPT_CACHE or ~/.cache/fedprompt")
    report: bool = option(True, "draw plots and write report.html at the end")


@dataclass(frozen=True)
class Config:
    """One experiment, complete and frozen."""

    experiment: str
    seed: int
    backbone: BackboneConfig
    data: DataConfig
    partition: PartitionConfig
    method: Any  # the config dataclass that the method's own file defines
    strategy: Any  # likewise, the strategy's
    training: TrainingConfig
    federation: FederationConfig
    grid: GridConfig
    evaluation: EvaluationConfig
    output: OutputConfig
    protocols: list[str]  # what is measured, see fedprompt/protocols
    protocol_options: dict[str, Any]  # by protocol, the config dataclass of its own module


SECTIONS: dict[str, type[Any]] = {
    "backbone": BackboneConfig,
    "data": DataConfig,
    "partition": PartitionConfig,
    "training": TrainingConfig,
    "federation": FederationConfig,
    "grid": GridConfig,
    "evaluation": EvaluationConfig,
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


def validate(raw: Mapping[str, Any]) -> Config:
    """A frozen `Config` from plain nested dicts; raises `UserError` as `compose` does."""
    from fedprompt import protocols
    from fedprompt.methods import method_class
    from strategies import strategy_class

    for key in raw:
        if key not in TOP_LEVEL:
            hint = did_you_mean(str(key), TOP_LEVEL)
            raise UserError(f"config: unknown key {str(key)!r}.{hint}")
    parts: dict[str, Any] = {}
    for name, schema in SECTIONS.items():
        parts[name] = build(schema, _mapping(name, raw.get(name)), name)
    method = dict(_mapping("method", raw.get("method")))
    strategy = dict(_mapping("strategy", raw.get("strategy")))
    parts["method"] = build(
        method_class(str(method.get("name", "fedrsclip"))).Config, method, "method"
    )
    parts["strategy"] = build(
        strategy_class(str(strategy.get("name", "fedavg"))).Config, strategy, "strategy"
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
    return config


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
    """The catalogue of data sets; imported late, since the data package needs this module."""
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
        hint = did_you_mean(path[0], TOP_LEVEL)
        raise UserError(f"config: unknown key {key.strip()!r}.{hint}")
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except Exception as error:  # OmegaConf's and PyYAML's errors have no common public parent
        raise UserError(f"config: cannot read {item!r}: {_one_line(error)}.") from None
    if parsed["value"] is None and _selects_group(path):
        raise UserError(f"config: {item!r} has no value.")
    return path, parsed["value"]


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
