"""The typed schema of an experiment config: every key, its default, its limits and what it means.

Defaults of methods and strategies stand in their own files.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import OmegaConf

from fedprompt.config.fields import option
from fedprompt.errors import UserError


@dataclass(frozen=True)
class BackboneConfig:
    """Which CLIP, where it runs and how precisely."""

    model: str = option("tiny", "open_clip model name, or 'tiny' for the embedded one")
    pretrained: str | None = option(None, "open_clip pretrained tag, e.g. 'openai'")
    checkpoint: str | None = option(
        None,
        "local weights (.safetensors or .pt); beside a tag, whose settings then hold",
        path=True,
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto takes a GPU when there is one")
    precision: Literal["float32", "bf16"] = option("float32", "bf16 = matrix products in bfloat16")
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

    source: Literal["aerial_scenes", "folder", "client_folders", "hub", "catalogue", "multi"] = (
        option("aerial_scenes", "kind of data set")
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
        None,
        "folder: root/class/*.jpg or root/{train,test}/class/*.jpg; catalogue: the authors'; "
        "client_folders: the server's test images, root/class/*.jpg",
        path=True,
    )
    # source: client_folders
    folders: list[str] = option(
        [],
        "client_folders: folder/class/*.jpg of every client; empty = each on its own node",
        path=True,
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
    hub_id: str | None = option(
        None, "Hugging Face data set id, or a local data set folder", path=True
    )
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
        if self.source == "client_folders":
            self._check_client_folders()
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

    def _check_client_folders(self) -> None:
        if len(self.class_names) < 2:
            raise UserError("source 'client_folders' needs 'class_names', at least two.")
        from fedprompt.data.images import name_key  # late: the data package needs this module

        if len(set(map(name_key, self.class_names))) < len(self.class_names):
            raise UserError("'class_names' lists a class twice.")

    def _check_catalogue(self) -> None:
        if self.dataset is None:
            raise UserError("source 'catalogue' needs 'dataset', a name of 'fedprompt data list'.")
        from fedprompt.data import catalogue  # late: the data package needs this module

        entry = catalogue.entry(self.dataset)
        if not (self.root or self.hub_id):
            raise UserError(
                f"no copy of {self.dataset} on the hub is known; download {entry.download} from "
                f"{entry.homepage}, unpack it and set data.root to the folder."
            )

    def _check_multi(self) -> None:
        from fedprompt.data.sources import combined as multi  # it needs this module

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
        None,
        "a partition file that takes the place of the scheme and of the keys that shape it",
        path=True,
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

    optimizer: Literal["sgd", "adam", "adamw"] = option("sgd", "local optimiser")
    lr: float = option(0.002, "learning rate in round 1", gt=0)
    momentum: float = option(0.9, "SGD momentum", ge=0, lt=1)
    betas: list[float] = option([0.9, 0.999], "adam, adamw: decay of both moments")
    eps: float = option(1e-8, "adam, adamw: added to the denominator", gt=0)
    weight_decay: float = option(5e-4, "weight decay", ge=0)
    schedule: Literal["cosine", "constant"] = option("cosine", "learning rate over rounds")
    local_epochs: int = option(1, "passes over the local images per round", ge=1)
    batch_size: int = option(32, "images per step", ge=1)

    def check(self) -> None:
        """Adam's two decays."""
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(f"'betas' is {self.betas}; it takes two numbers in [0, 1).")


@dataclass(frozen=True)
class FederationConfig:
    """Rounds and participation."""

    rounds: int = option(10, "communication rounds", ge=0)
    fraction: float = option(1.0, "share of clients that train in a round", gt=0, le=1)
    min_replies: int = option(1, "fewest valid replies for a round to count", ge=1)
    timeout_s: float = option(3600.0, "longest wait for replies, seconds", gt=0)
    min_nodes: int = option(
        0, "deployment: fewest nodes to begin with when node_wait_s is over; 0 = all", ge=0
    )
    node_wait_s: float = option(300.0, "longest wait for nodes to join, seconds", gt=0)


@dataclass(frozen=True)
class SimulationConfig:
    """Where client messages run in a simulation."""

    kind: Literal["inline", "ray"] = option("inline", "inline = this process; ray = Ray actors")
    clients_per_block: int = option(
        0, "clients trained in one call; 0 = chosen from the sizes", ge=0
    )
    threads: int = option(0, "CPU threads per process; 0 = all (inline) or cpus_per_worker", ge=0)
    workers: int = option(2, "ray: number of actors", ge=1)
    cpus_per_worker: float = option(1.0, "ray: CPUs of one actor", gt=0)
    gpus_per_worker: float = option(0.0, "ray: GPUs of one actor; fractions share a GPU", ge=0)
    ray_address: str | None = option(None, "ray: cluster to join, e.g. 'auto' or 'host:6379'")
    block_timeout_s: float = option(1800.0, "ray: time limit of one block, seconds", gt=0)
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
class AttackConfig:
    """Malicious or broken clients of a simulation."""

    kind: Literal[
        "none",
        "sign_flip",
        "scaling",
        "label_flip",
        "random_noise",
        "many_examples",
        "nan",
        "inf",
        "wrong_name",
        "wrong_shape",
        "wrong_type",
        "giant",
        "crash",
    ] = option("none", "what attackers send, see fedprompt/simulation/attacks.py")
    share: float = option(0.3, "share of the clients that attack, drawn from the seed", ge=0, le=1)
    scale: float = option(1.0, "size of an attack, in sizes of an honest change", gt=0)


@dataclass(frozen=True)
class PrivacyConfig:
    """Noise that clients add to what they send; strategy dp_fedavg adds noise on the server."""

    noise: float = option(0.0, "noise multiplier z: standard deviation over clip; 0 = off", ge=0)
    clip: float = option(1.0, "largest L2 norm S of a client's change", gt=0)
    delta: float = option(1e-5, "delta that epsilon is given for", gt=0, lt=1)
    noise_seed: int | None = option(
        None, "fixes the noise, which is then no secret; null = from the operating system"
    )


@dataclass(frozen=True)
class SecureAggregationConfig:
    """The server learns the sum of the clients' updates and no single one (SecAgg+)."""

    enabled: bool = option(False, "whether updates are masked")
    shares: int = option(
        0, "clients among whom each splits its keys, itself included; 0 = all of the round", ge=0
    )
    threshold: float = option(
        0.6, "part of the shares that recovers a key, and of a client's peers that must stay",
        gt=0.5, le=1,
    )  # fmt: skip
    clip: float = option(
        1.0, "largest change of a shared number in a round; more is cut off and counted", gt=0
    )
    max_weight: int = option(1000, "most training images that a client may hold", ge=1)

    def check(self) -> None:
        """A client has as many peers on either side of it."""
        if self.shares and (self.shares < 3 or self.shares % 2 == 0):
            raise UserError(f"'shares' is {self.shares}; it must be odd and at least 3, or 0.")


@dataclass(frozen=True)
class OutputConfig:
    """Where results go."""

    root: str = option("runs", "folder that holds run folders", path=True)
    dir: str | None = option(
        None, "run folder; null = root/<experiment>-<method>-seed<seed>", path=True
    )
    checkpoint_every: int = option(1, "rounds between checkpoints", ge=1)
    cache: str | None = option(
        None, "feature cache; null = $FEDPROMPT_CACHE or ~/.cache/fedprompt", path=True
    )
    report: bool = option(True, "draw plots and write report.html at the end")
    loggers: list[str] = option([], "trackers to report to: tensorboard, mlflow, wandb")

    def check(self) -> None:
        """Names of loggers; whether they are installed matters only to who runs."""
        from fedprompt.experiment.trackers import check_names  # late: it needs this module

        check_names(self.loggers)


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
    simulation: SimulationConfig
    evaluation: EvaluationConfig
    attack: AttackConfig
    privacy: PrivacyConfig
    secure_aggregation: SecureAggregationConfig
    output: OutputConfig
    protocols: list[str]  # what is measured, see fedprompt/protocols
    protocol_options: dict[str, Any]  # by protocol, the config dataclass of its own module


SECTIONS: dict[str, type[Any]] = {
    "backbone": BackboneConfig,
    "data": DataConfig,
    "partition": PartitionConfig,
    "training": TrainingConfig,
    "federation": FederationConfig,
    "simulation": SimulationConfig,
    "evaluation": EvaluationConfig,
    "attack": AttackConfig,
    "privacy": PrivacyConfig,
    "secure_aggregation": SecureAggregationConfig,
    "output": OutputConfig,
}


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain nested dicts, complete: `validate(to_dict(c)) == c`."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The config as YAML, complete; what a run folder's `config.yaml` holds."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))
