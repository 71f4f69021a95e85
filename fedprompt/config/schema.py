"""The typed schema of an experiment: the sections, their keys, defaults, limits and help texts.

The keys of a method, strategy, protocol or data source are defined in its module. Checks that
compare several sections are in `fedprompt.experiment.validate`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from omegaconf import OmegaConf

from fedprompt.config.conditions import AsynchronousConfig, ClockConfig, ConditionsConfig
from fedprompt.config.fields import option
from fedprompt.config.multi_label import MultiLabelConfig
from fedprompt.config.protection import AttackConfig, PrivacyConfig, SecureAggregationConfig
from fedprompt.errors import UserError

WeightFormat = Literal["float32", "bf16", "fp16", "int8", "int4"]
"""How the weight matrices of a backbone are kept."""
FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
LOCAL_FOLDER, ON_HUB = "local-dir:", "hf-hub:"
"""How `backbone.model` begins where it names a folder or a model on the hub, as in open_clip."""


@dataclass(frozen=True)
class BackboneConfig:
    """The frozen CLIP model, its device and its precision."""

    model: str = option(
        "tiny",
        "open_clip model name, 'local-dir:FOLDER' or 'hf-hub:OWNER/NAME' for a model in the hub's "
        "layout, or 'tiny' for the embedded one",
    )
    pretrained: str | None = option(None, "open_clip pretrained tag, e.g. 'openai'")
    checkpoint: str | None = option(
        None,
        "local weights (.safetensors or .pt); beside a tag, whose settings then hold",
        path=True,
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = option(
        "auto", "auto = cuda, also for ROCm, when there is a GPU; mps = Apple's, on request only"
    )
    precision: Literal["float32", "tf32", "bf16"] = option(
        "float32", "matrix products in TensorFloat-32 (NVIDIA GPUs only) or in bfloat16"
    )
    weights: WeightFormat = option(
        "float32",
        "format in which the weight matrices are kept; products take backbone.precision. int8 and "
        "int4 need the extra 'quant'",
    )
    pruned: float = option(
        0.0,
        "fraction of each weight matrix that is set to 0, the smallest numbers first",
        ge=0,
        lt=1,
    )
    client_weights: list[str] = option(
        [],
        "formats of the clients' weights, dealt to them in turn, e.g. [float32, int8]; empty = "
        "weights",
    )
    client_models: list[str] = option(
        [],
        "names of backbone configs, dealt to the clients in turn: other image towers beside the "
        "text tower of model; empty = model. For methods that share prompts of the text tower only",
    )
    deterministic: bool = option(
        False, "on a GPU, add in a fixed order: the same bits again, more slowly; no effect on CPUs"
    )
    cuda_graphs: bool = option(
        False,
        "on an NVIDIA GPU, record a local step once and replay it: less time between kernels; no "
        "effect elsewhere",
    )
    image_batch: int = option(64, "images encoded at once when features are cached", ge=1)

    def check(self) -> None:
        """Refuse a model without weights, and clients' formats that do not exist."""
        for name in self.client_weights:
            if name not in FORMATS:
                raise UserError(
                    f"backbone.client_weights: '{name}' is not one of {', '.join(FORMATS)}."
                )
        if self.model.startswith((LOCAL_FOLDER, ON_HUB)):
            if self.pretrained:
                raise UserError(
                    f"'{self.model}' comes with its own weights, so backbone.pretrained "
                    f"({self.pretrained}) would be ignored; leave one of the two out."
                )
            return
        if self.model != "tiny" and not (self.pretrained or self.checkpoint):
            raise UserError(
                f"'{self.model}' needs weights: set backbone.pretrained (a tag) or "
                "backbone.checkpoint (a local file)."
            )

    def kind_of(self, client: int) -> str:
        """What a client's backbone is called where backbones differ: its config and its format."""
        if not self.client_models:
            return self.weights_of(client)
        name = self.client_models[client % len(self.client_models)]
        return f"{name}, {self.weights_of(client)}" if self.client_weights else name

    @property
    def differs(self) -> bool:
        """Whether some client's backbone is not the server's, or is kept in another format."""
        return bool(self.client_models) or not set(self.client_weights) <= {self.weights}

    def weights_of(self, client: int) -> WeightFormat:
        """The format in which a client keeps the weights."""
        if not self.client_weights:
            return self.weights
        name = self.client_weights[client % len(self.client_weights)]
        return FORMATS[FORMATS.index(name)]


@dataclass(frozen=True)
class PartitionConfig:
    """How the training images are divided among clients."""

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
    local_validation_fraction: float = option(
        0.0,
        "share of a client's images on which choices are made, never trained on or tested; not 0 "
        "with shots: min(shots, 4) per class",
        ge=0, lt=1,
    )  # fmt: skip
    server_validation_fraction: float = option(
        0.0, "share of the server's test images on which choices are made instead", ge=0, lt=1
    )
    unlabelled_clients: int = option(
        0,
        "clients, drawn at random, whose training images have no labels: they train only with "
        "methods that learn without, or on pseudo-labels",
        ge=0,
    )
    relabel_every: int | None = option(
        None,
        "rounds after which clients without labels choose pseudo-labels anew, on which they train; "
        "0 = they have none; null = as the method has it",
        ge=0,
    )
    unsure_share: float = option(
        0.5, "with relabel_every: share of a client's images whose guesses do not count", ge=0, lt=1
    )
    late_clients: int = option(
        0,
        "clients, drawn at random, that are never asked to train: they join after the last round "
        "(protocol late_joiners)",
        ge=0,
    )
    labels_per_round: int = option(
        0,
        "labels that each client asks for in every active round; 0 = all labels are known",
        ge=0,
    )
    active_rounds: int = option(
        8, "with labels_per_round: active rounds, into which federation.rounds is divided", ge=1
    )
    query: Literal["random", "entropy", "coreset", "badge"] = option(
        "random", "with labels_per_round: which images a client asks about, after the first time"
    )
    query_balanced: bool = option(
        True, "with labels_per_round: PCB, which balances the classes of what is asked"
    )
    query_candidates: float = option(
        0.1, "share of a client's images among which PCB chooses", gt=0, le=1
    )
    sessions: int = option(
        0,
        "class-incremental learning: sessions in which classes arrive, in label order, and into "
        "which federation.rounds is divided; 0 = all classes are there from the start",
        ge=0,
    )
    first_session_share: float = option(
        0.0, "with sessions: share of classes in the first one, rounded up; 0 = as in the others",
        ge=0, lt=1,
    )  # fmt: skip
    session_shots: int | None = option(
        None, "with sessions: training images per class and client after the first one", ge=1
    )
    file: str | None = option(
        None,
        "a partition file that takes the place of the scheme and of the keys that shape it",
        path=True,
    )

    def check(self) -> None:
        """Refuse a federation in which no client could have training images."""
        if self.local_test_fraction + self.local_validation_fraction >= 1:
            raise UserError(
                f"'local_test_fraction' ({self.local_test_fraction:g}) and "
                f"'local_validation_fraction' ({self.local_validation_fraction:g}) leave no "
                "training images; their sum must be below 1."
            )
        if self.sessions == 1:
            raise UserError("'sessions' is 1; it takes two or more, or 0 for none.")
        if self.unlabelled_clients > self.clients:
            raise UserError(
                f"'unlabelled_clients' is {self.unlabelled_clients} of {self.clients} clients."
            )
        if self.late_clients >= self.clients:
            raise UserError(
                f"'late_clients' is {self.late_clients} of {self.clients} clients; at least one "
                "must train."
            )
        if self.late_clients and self.unlabelled_clients:
            raise UserError(
                "'late_clients' need labels, and 'unlabelled_clients' may be the same; set one of "
                "the two."
            )


@dataclass(frozen=True)
class DataConfig:
    """The keys that every data source has.

    Each source derives its config from this class in its module of `fedprompt/data/sources`.
    """

    source: str = option("aerial_scenes", "the data source; it decides which other keys there are")
    title: str = option("data", "name of the data set in tables and plots")
    templates: list[str] = option(
        ["a photo of a {}."], "prompts of zero-shot CLIP; {} stands for the class name"
    )
    class_names: list[str] = option(
        [], "class names in label order; empty = the names of the data set"
    )
    descriptions: str | None = option(
        None,
        "sentences about each class, for methods that read them: a YAML file, or a shipped one's "
        "name; null = the templates stand in",
        path=True,
    )
    views: int = option(
        1, "views per training image: the image itself and views - 1 random crops",
        ge=1, le=64,
    )  # fmt: skip
    # The default is that of torchvision's `RandomResizedCrop` and of CoOp.
    crop_scale: float = option(
        0.08, "smallest share of an image's area in a random crop", gt=0, le=1
    )

    def check(self) -> None:
        """Refuse templates without exactly one place for the class name."""
        for template in self.templates:
            if template.count("{}") != 1:
                raise UserError(f"template '{template}' must contain {{}} exactly once.")
        if not self.templates:
            raise UserError("'templates' is empty; give at least one, e.g. 'a photo of a {}.'.")

    @property
    def official_validation(self) -> bool:
        """Whether the data set's own validation images become the server's; by default not."""
        return False

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels: the multi-label task; by default it has one."""
        return False

    def check_partition(self, partition: PartitionConfig) -> None:
        """Refuse a partition that does not fit this data set, before any image is opened.

        The base class accepts every partition; sources override this method.

        Args:
            partition: the `partition` section of the same experiment.

        Raises:
            UserError: the partition does not fit; the message names the key.
        """


@dataclass(frozen=True)
class TrainingConfig:
    """Local training on a client."""

    # The defaults of SGD, the learning rate, its schedule and the weight decay are CoOp's.
    optimizer: Literal["sgd", "adam", "adamw"] = option("sgd", "local optimiser")
    lr: float = option(0.002, "learning rate in round 1", gt=0)
    momentum: float = option(0.9, "SGD momentum", ge=0, lt=1)
    momentum_state: Literal["reset", "keep"] = option(
        "reset", "sgd: a client's momentum starts at zero in each round, or is kept from its last"
    )
    betas: list[float] = option([0.9, 0.999], "adam, adamw: decay of both moments")
    eps: float = option(1e-8, "adam, adamw: added to the denominator", gt=0)
    weight_decay: float = option(5e-4, "weight decay", ge=0)
    clip_grad_norm: float | None = option(
        None,
        "largest Euclidean norm of the gradient of one client's trained tensors; null = no limit",
        gt=0,
    )
    schedule: Literal["cosine", "constant"] = option("cosine", "learning rate over rounds")
    local_epochs: int = option(1, "passes over the local images per round", ge=1)
    batch_size: int = option(32, "images per step", ge=1)

    def check(self) -> None:
        """Refuse `betas` that are not two numbers in [0, 1), and a state that Adam cannot keep."""
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(f"'betas' is {self.betas}; it takes two numbers in [0, 1).")
        if self.momentum_state == "keep" and self.optimizer != "sgd":
            raise UserError(
                f"'momentum_state' is 'keep', but optimizer '{self.optimizer}' starts anew in each "
                "round; set momentum_state=reset, or optimizer=sgd."
            )


@dataclass(frozen=True)
class FederationConfig:
    """Rounds, participation and time limits."""

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
    """Where the messages to clients are processed in a simulation."""

    kind: Literal["inline", "ray"] = option("inline", "inline = this process; ray = Ray actors")
    clients_per_block: int = option(
        0, "clients trained in one call; 0 = chosen from the sizes", ge=0
    )
    threads: int = option(0, "CPU threads per process; 0 = all (inline) or cpus_per_worker", ge=0)
    workers: int = option(2, "ray: number of actors", ge=1)
    cpus_per_worker: float = option(1.0, "ray: CPUs of one actor", gt=0)
    gpus_per_worker: float | None = option(
        None,
        "ray: GPUs of one actor, at most 1; null = all GPUs are shared evenly; fractions share one",
        ge=0, le=1,
    )  # fmt: skip
    ray_address: str | None = option(None, "ray: cluster to join, e.g. 'auto' or 'host:6379'")
    block_timeout_s: float = option(1800.0, "ray: time limit of one block, seconds", gt=0)
    retries: int = option(2, "ray: tries after a worker died", ge=0)


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured and when."""

    select: Literal["last", "best_validation"] = option(
        "last",
        "the round whose accuracies are reported; best_validation: the global model's best on the "
        "server's validation images, each personal model's best on its client's own",
    )
    objective: Literal["personal", "global"] = option(
        "personal",
        "the accuracy on validation images that fedprompt tune and stop_below go by: mean over "
        "personal models, or the global model",
    )
    withhold_tests: bool = option(
        False, "open no test image, so that nothing can be chosen by it; set by fedprompt tune"
    )
    stop_below: list[float] = option(
        [],
        "end the run after round r if the best objective so far is below the r-th number; set by "
        "fedprompt tune",
    )
    chosen_by: str = option(
        "", "the search that chose these settings, shown under tables; set by fedprompt tune"
    )
    every: int = option(1, "evaluate every n rounds, and at the end", ge=1)
    clients: Literal["all", "participants"] = option(
        "all", "personal tests: all, or those who trained in the round and all at the end"
    )
    local_only: bool = option(True, "also train every client alone for as many rounds")
    local_only_tokens: int | None = option(
        None, "context tokens of that CoOp; null = as many as the method's prompts, or else 4", ge=1
    )
    local_only_lr: float | None = option(
        None,
        "learning rate of that CoOp; null = training.lr, which may suit the method alone",
        gt=0,
    )
    personal_on_global: bool = option(True, "also test personal models on the server test set")
    personal_on_global_every: int | None = option(
        None,
        "n = in evaluated rounds divisible by n, and at the end; 0 = at the end only; null = in "
        "every evaluated round, or at the end only if that is not affordable beside the training "
        "(the run says so at its start)",
        ge=0,
    )


@dataclass(frozen=True)
class OutputConfig:
    """Where results are written."""

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


@dataclass(frozen=True)
class Config:
    """The complete config of one experiment."""

    experiment: str
    seed: int
    backbone: BackboneConfig
    data: DataConfig
    partition: PartitionConfig
    # `Any`, because methods, strategies and protocols are defined above this package and register
    # their config dataclasses by name.
    method: Any
    strategy: Any
    training: TrainingConfig
    multi_label: MultiLabelConfig
    federation: FederationConfig
    conditions: ConditionsConfig
    clock: ClockConfig
    asynchronous: AsynchronousConfig
    simulation: SimulationConfig
    evaluation: EvaluationConfig
    attack: AttackConfig
    privacy: PrivacyConfig
    secure_aggregation: SecureAggregationConfig
    output: OutputConfig
    protocols: list[str]  # names of modules of fedprompt.evaluation.protocols
    protocol_options: dict[str, Any]  # the config dataclass of each of these protocols

    @property
    def relabel_every(self) -> int:
        """After how many rounds clients without labels choose pseudo-labels anew; 0 for never."""
        own = self.partition.relabel_every
        return int(self.method.relabel_every if own is None else own)

    @property
    def trains_without_labels(self) -> bool:
        """Whether clients without labels train: by the method's own means, or on pseudo-labels."""
        return bool(self.method.learns_without_labels or self.relabel_every)

    @property
    def able_to_train(self) -> int:
        """Number of clients that can train, provided that each has training images."""
        partition = self.partition
        unable = 0 if self.trains_without_labels else partition.unlabelled_clients
        return partition.clients - unable - partition.late_clients


# `data`, `method` and `strategy` are missing: their classes depend on the names that are selected.
SECTIONS: dict[str, type[Any]] = {
    "backbone": BackboneConfig,
    "partition": PartitionConfig,
    "training": TrainingConfig,
    "multi_label": MultiLabelConfig,
    "federation": FederationConfig,
    "conditions": ConditionsConfig,
    "clock": ClockConfig,
    "asynchronous": AsynchronousConfig,
    "simulation": SimulationConfig,
    "evaluation": EvaluationConfig,
    "attack": AttackConfig,
    "privacy": PrivacyConfig,
    "secure_aggregation": SecureAggregationConfig,
    "output": OutputConfig,
}


def to_dict(config: Config) -> dict[str, Any]:
    """The complete config as plain nested dicts: `validate(to_dict(c)) == c`."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The complete config as YAML, as it is written to `config.yaml` in the run folder."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))
