"""From nested dicts to a frozen config, with all checks that concern more than one section.

Checks of a single key or section belong to its dataclass. The checks here also need the registries
of methods, strategies, protocols and data sources, so they cannot be part of `fedprompt.config`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fedprompt.config.as_typed import for_kind
from fedprompt.config.fields import build
from fedprompt.config.renamed import refuse_renamed
from fedprompt.config.schema import (
    SECTIONS,
    Config,
)
from fedprompt.data.partition.pseudo_labels import check_pseudo_labels
from fedprompt.data.sources.registry import build_data
from fedprompt.errors import UserError, any_of, did_you_mean
from fedprompt.evaluation import registry as protocols
from fedprompt.experiment.label_sets import check_multi_label
from fedprompt.experiment.trackers import check_names
from fedprompt.federation.registry import all_strategies, strategy_class
from fedprompt.federation.strategy import SharedPromptStrategy
from fedprompt.methods.method_config import allows_image_noise
from fedprompt.methods.registry import all_methods, method_class
from fedprompt.privacy.secure_aggregation.params import FEWEST_CLIENTS, SEEN_THROUGH

TOP_LEVEL = (
    "experiment", "seed", "data", "method", "strategy", *SECTIONS, "protocols", "protocol_options"
)  # fmt: skip

SEEDS = 10**18
"""Seeds are below this. Every language that reads a config has whole numbers of this size."""


def validate(raw: Mapping[str, Any]) -> Config:
    """Check plain nested dicts and freeze them as a `Config`.

    Args:
        raw: sections by name, as in a run folder's `config.yaml`. Missing keys get their defaults.

    Returns:
        The complete config.

    Raises:
        UserError: a key is unknown, a value has the wrong type or is impossible, or sections do
            not fit together. The message names the key.
    """
    _check_keys(raw)
    parts: dict[str, Any] = {}
    for name, schema in SECTIONS.items():
        parts[name] = build(schema, _mapping(name, raw.get(name)), name)
    check_names(parts["output"].loggers)
    parts["data"] = build_data(_mapping("data", raw.get("data")))
    parts["data"].check_partition(parts["partition"])
    method = dict(_mapping("method", raw.get("method")))
    cls = method_class(str(method.get("name", "fedrsclip")))
    parts["method"] = build(cls.Config, method, "method")
    strategy = dict(_mapping("strategy", raw.get("strategy")))
    # `auto` stands for the strategy of the method's paper. The run folder's config names it.
    if strategy.get("name", "auto") == "auto":
        strategy = {**strategy, **parts["method"].default_strategy}
    rule = str(strategy["name"])
    parts["strategy"] = build(strategy_class(rule).Config, strategy, "strategy")
    possible = parts["method"].supported_strategies
    if possible is not None and rule not in possible:
        raise UserError(
            f"config: method '{cls.name}' cannot do without strategy "
            f"{' or '.join(sorted(possible))}; leave strategy out, or set strategy=auto."
        )
    parts["protocols"], parts["protocol_options"] = protocols.build_options(
        for_kind(raw.get("protocols", protocols.DEFAULT), list[str], "protocols"),
        raw.get("protocol_options"),
    )
    config = Config(experiment=_experiment(raw), seed=_seed(raw), **parts)
    # Called for its error: two protocols may not both hold something out.
    protocols.who_holds_out(protocols.open_protocols(config))
    check_config(config)
    return config


def _check_keys(raw: Mapping[str, Any]) -> None:
    """Refuse unknown top-level keys; the message has a renamed key's new name or the nearest."""
    for key in raw:
        if key not in TOP_LEVEL:
            refuse_renamed(str(key))
            hint = did_you_mean(str(key), TOP_LEVEL)
            raise UserError(f"config: unknown key {str(key)!r}.{hint}")


def _seed(raw: Mapping[str, Any]) -> int:
    seed = for_kind(raw.get("seed", 1), int, "seed")
    # A bool is an int in Python, so `seed: true` would be seed 1.
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEEDS:
        raise UserError(
            f"config: seed is {seed!r}; it must be a whole number, 0 or more, of at most 18 digits."
        )
    return seed


def _experiment(raw: Mapping[str, Any]) -> str:
    """The experiment's name, which must be valid as part of a folder's name."""
    name = for_kind(raw.get("experiment", "experiment"), str, "experiment")
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w .+-]*", name):
        raise UserError(
            f"config: experiment is {name!r}; it names the run folder: use letters, digits, "
            "'-', '_', '.'."
        )
    return name


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    # A section without keys is None in YAML.
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"config: '{name}' must hold keys, got {value!r}.")
    return value


def check_config(config: Config) -> None:
    """Check what concerns several sections: validation images, labels, momentum, secure sums.

    Args:
        config: the whole experiment.

    Raises:
        UserError: the server would have validation images of two kinds; a round is to be chosen
            without any; the rounds cannot be divided into active rounds, or a protocol needs the
            labels that are hidden; likewise for sessions in which classes arrive; pseudo-labels
            cannot be had; no client has labels and the method needs them; the method needs a
            momentum that starts at zero, SGD, or float64 on a device without it; or, with secure
            aggregation, the strategy needs single replies, the attack is one that only checks of
            single replies detect, or a round has too few clients.
    """
    partition, official = config.partition, config.data.official_validation
    if official and partition.server_validation_fraction:
        raise UserError(
            "config: partition.server_validation_fraction takes validation images from the test "
            "images, and the data set's own are used already (data.validation=server or "
            "data.validation_split); set one of the two."
        )
    some = official or partition.local_validation_fraction or partition.server_validation_fraction
    # A partition file may contain validation images; `Federation` sees it.
    if config.evaluation.select == "best_validation" and not some and partition.file is None:
        raise UserError(
            "config: evaluation.select=best_validation needs validation images: set "
            "partition.local_validation_fraction and partition.server_validation_fraction."
        )
    if not config.able_to_train:
        raise UserError(
            f"config: 'unlabelled_clients' is {partition.unlabelled_clients} of "
            f"{partition.clients} clients, and method '{config.method.name}' needs labels; at "
            "least one client must have them."
        )
    if partition.unlabelled_clients and config.relabel_every:
        check_pseudo_labels(config)
    check_multi_label(config)
    if partition.labels_per_round:
        _check_active_learning(config)
    if partition.sessions or "class_incremental" in config.protocols:
        _check_sessions(config)
    if config.training.momentum_state == "keep" and not config.method.keeps_momentum:
        raise UserError(
            f"config: method '{config.method.name}' needs a momentum that starts each round at "
            "zero; set training.momentum_state=reset."
        )
    if config.training.optimizer != "sgd" and config.method.needs_sgd:
        raise UserError(
            f"config: method '{config.method.name}' is about the steps of SGD; set "
            f"training.optimizer=sgd, not {config.training.optimizer}."
        )
    if config.backbone.device == "mps" and config.method.needs_float64:
        raise UserError(
            f"config: method '{config.method.name}' computes in float64 with these settings, which "
            "backbone.device=mps does not have; use cpu, or another method."
        )
    if config.asynchronous.enabled:
        _check_asynchronous(config)
    if config.attack.kind == "backdoor":
        _check_backdoor(config)
    if config.privacy.image_noise:
        _check_image_noise(config)
    if config.secure_aggregation.enabled:
        _check_secure_aggregation(config)


def _check_image_noise(config: Config) -> None:
    if not allows_image_noise(config.method):
        able = [n for n, cls in all_methods().items() if allows_image_noise(cls.Config())]
        raise UserError(
            f"config: method '{config.method.name}' with these settings lets out more of an image "
            "than the gradient of its own loss, which is all that privacy.image_noise protects; "
            f"use {any_of(able)}."
        )
    sampling = config.privacy.image_sampling
    clashes = {
        "asynchronous.enabled, as epsilon is counted by rounds": config.asynchronous.enabled,
        "partition.labels_per_round, as the images decide which labels are asked for": (
            bool(config.partition.labels_per_round)
        ),
        "partition.sessions with privacy.image_sampling=poisson, as the number of images changes": (
            bool(config.partition.sessions) and sampling == "poisson"
        ),
    }
    for what in (name for name, there in clashes.items() if there):
        raise UserError(f"config: privacy.image_noise excludes {what}; leave one of them out.")


def _check_active_learning(config: Config) -> None:
    rounds, stages = config.federation.rounds, config.partition.active_rounds
    if not rounds or rounds % stages:
        raise UserError(
            f"config: federation.rounds={rounds} cannot be divided into partition.active_rounds="
            f"{stages} equal parts; use a multiple."
        )
    if others := {"late_joiners", "privacy_audit", "unlearning"} & set(config.protocols):
        raise UserError(
            f"config: protocol {min(others)} trains clients on all their labels, which "
            "partition.labels_per_round hides; leave one of them out."
        )


def _check_asynchronous(config: Config) -> None:
    if not config.clock.enabled:
        raise UserError(
            "config: asynchronous.enabled needs to know when clients are done; set "
            "clock.enabled=true."
        )
    excluded = {
        "clock.deadline_s, since nobody waits for a slow client": config.clock.deadline_s,
        "secure_aggregation, whose sums are those of a round": config.secure_aggregation.enabled,
        "privacy.noise, whose epsilon is counted by rounds": config.privacy.noise,
        "partition.labels_per_round, for which all ask at once": config.partition.labels_per_round,
        f"method '{config.method.name}', which counts rounds": config.method.lr_cycles > 1,
        f"method '{config.method.name}', whose server trains on a round": config.method.refines,
    }
    for what, there in excluded.items():
        if there:
            raise UserError(f"config: asynchronous.enabled excludes {what}; leave one of them out.")
    if not strategy_class(config.strategy.name).works_without_rounds():
        raise UserError(
            f"config: strategy '{config.strategy.name}' needs the clients of one and the same "
            "round, which asynchronous.enabled does not have; use fedavg."
        )
    if config.asynchronous.buffer > config.able_to_train:
        raise UserError(
            f"config: asynchronous.buffer={config.asynchronous.buffer} waits for more clients than "
            f"the {config.able_to_train} that train; lower it."
        )
    if config.asynchronous.buffer < config.federation.min_replies:
        raise UserError(
            f"config: federation.min_replies={config.federation.min_replies} is more than the "
            f"asynchronous.buffer={config.asynchronous.buffer} replies of a step, so that no step "
            "would count; lower it."
        )


def _check_backdoor(config: Config) -> None:
    rule, plain = strategy_class(config.strategy.name), SharedPromptStrategy
    if (rule.client_shared, rule.eval_extras) != (plain.client_shared, plain.eval_extras):
        raise UserError(
            f"config: attack.kind=backdoor is measured on the global model, of which strategy "
            f"'{config.strategy.name}' sends attackers another version; use another strategy."
        )


def _check_sessions(config: Config) -> None:
    rounds, sessions = config.federation.rounds, config.partition.sessions
    if not sessions or "class_incremental" not in config.protocols:
        raise UserError(
            "config: partition.sessions and protocol class_incremental belong together; set both, "
            "such as partition.sessions=4."
        )
    if not rounds or rounds % (sessions * config.evaluation.every):
        raise UserError(
            f"config: federation.rounds={rounds} cannot be divided into partition.sessions="
            f"{sessions} equal parts that end with an evaluation (evaluation.every="
            f"{config.evaluation.every}); use a multiple."
        )
    clashes = {
        "partition.labels_per_round": bool(config.partition.labels_per_round),
        "secure_aggregation.enabled": config.secure_aggregation.enabled,
        "asynchronous.enabled": config.asynchronous.enabled,
        "partition.late_clients": bool(config.partition.late_clients),
        f"attack.kind={config.attack.kind}, which changes training images": (
            config.attack.kind in ("label_flip", "backdoor")
        ),
        f"method.name={config.method.name}, whose learning rate restarts in cycles": (
            config.method.lr_cycles > 1
        ),
        f"method.name={config.method.name}, whose server trains on the classes of a session": (
            config.method.refines
        ),
        "evaluation.select=best_validation": config.evaluation.select == "best_validation",
        **{
            f"protocol {name}": name in config.protocols
            for name in ("privacy_audit", "unlearning", "active_learning")
        },
    }
    for what in (name for name, there in clashes.items() if there):
        raise UserError(
            f"config: {what} cannot be combined with partition.sessions, in which classes arrive "
            "over time; leave one of them out."
        )


def _check_secure_aggregation(config: Config) -> None:
    if config.method.refines:
        raise UserError(
            f"config: the server of method '{config.method.name}' trains on the uploads of single "
            "clients, which secure_aggregation hides; leave one of them out."
        )
    if not strategy_class(config.strategy.name).needs_only_the_mean():
        able = [n for n, rule in all_strategies().items() if rule.needs_only_the_mean()]
        raise UserError(
            f"config: strategy '{config.strategy.name}' looks at single replies, which "
            f"secure_aggregation hides; use {any_of(able)}."
        )
    kind = config.attack.kind
    if kind not in ("none", *SEEN_THROUGH):
        raise UserError(
            f"config: attack.kind={kind} is caught by checks of single replies, which "
            f"secure_aggregation hides; use {any_of(SEEN_THROUGH)}."
        )
    if config.clock.enabled:
        raise UserError(
            "config: clock.enabled counts one message and one reply per client, and "
            "secure_aggregation exchanges five; leave one of the two out."
        )
    fraction = config.federation.fraction
    asked = max(1, round(fraction * config.able_to_train))
    if asked < FEWEST_CLIENTS:
        raise UserError(
            f"config: secure_aggregation needs {FEWEST_CLIENTS} clients in a round, and "
            f"federation.fraction={fraction:g} of {config.able_to_train} clients that train are "
            f"{asked}; from a sum of two, each client can compute the other's update."
        )


def unsuited_backbone(config: Config) -> str | None:
    """A warning for the embedded CLIP on images that it was not made for, None where it suits."""
    drawn = config.data.source in ("aerial_scenes", "aerial_objects")
    if config.backbone.model != "tiny" or drawn:
        return None
    return (
        "the embedded CLIP knows drawn aerial scenes only: on any other images its accuracy says "
        "nothing; choose a pretrained one with backbone=NAME ('fedprompt list backbone')."
    )
