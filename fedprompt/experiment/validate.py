"""From nested dicts to a frozen config, with all checks that concern more than one section."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fedprompt.config.fields import build
from fedprompt.config.renamed import refuse_renamed
from fedprompt.config.schema import (
    SECTIONS,
    Config,
)
from fedprompt.data.sources.registry import build_data
from fedprompt.errors import UserError, did_you_mean
from fedprompt.evaluation import registry as protocols
from fedprompt.experiment.trackers import check_names
from fedprompt.federation.registry import all_strategies, strategy_class
from fedprompt.methods.registry import method_class
from fedprompt.privacy.secure_aggregation.params import FEWEST_CLIENTS, SEEN_THROUGH

TOP_LEVEL = (
    "experiment", "seed", "data", "method", "strategy", *SECTIONS, "protocols", "protocol_options"
)  # fmt: skip


def validate(raw: Mapping[str, Any]) -> Config:
    """Check plain nested dicts and freeze them as a `Config`.

    Args:
        raw: sections by name, as in a run folder's `config.yaml`. Missing keys take their defaults.

    Returns:
        The complete config.

    Raises:
        UserError: an unknown key, a wrong type, an impossible value, or parts that do not fit
            together. The message names the key.
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
        raw.get("protocols", protocols.DEFAULT), raw.get("protocol_options")
    )
    config = Config(experiment=_experiment(raw), seed=_seed(raw), **parts)
    protocols.who_holds_out(protocols.open_protocols(config))
    check_config(config)
    return config


def _check_keys(raw: Mapping[str, Any]) -> None:
    """Refuse top-level keys that do not exist, with the new or the nearest name."""
    for key in raw:
        if key not in TOP_LEVEL:
            refuse_renamed(str(key))
            hint = did_you_mean(str(key), TOP_LEVEL)
            raise UserError(f"config: unknown key {str(key)!r}.{hint}")


def _seed(raw: Mapping[str, Any]) -> int:
    seed = raw.get("seed", 1)
    # True and False are integers in Python.
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(f"config: seed is {seed!r}; it must be a whole number, 0 or more.")
    return seed


def _experiment(raw: Mapping[str, Any]) -> str:
    """The experiment's name, which is part of the run folder's name."""
    name = raw.get("experiment", "experiment")
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w .+-]*", name):
        raise UserError(
            f"config: experiment is {name!r}; it names the run folder: use letters, digits, "
            "'-', '_', '.'."
        )
    return name


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"config: '{name}' must hold keys, got {value!r}.")
    return value


def check_config(config: Config) -> None:
    """Refuse what secure aggregation does not allow: rules that see replies, and small rounds.

    Raises:
        UserError: the strategy or the attack needs single replies, or a round has too few clients.
    """
    if not config.secure_aggregation.enabled:
        return
    if not strategy_class(config.strategy.name).needs_only_the_mean():
        able = [n for n, rule in all_strategies().items() if rule.needs_only_the_mean()]
        raise UserError(
            f"config: strategy '{config.strategy.name}' looks at single replies, which "
            f"secure_aggregation hides; use {', '.join(able[:-1])} or {able[-1]}."
        )
    kind = config.attack.kind
    if kind not in ("none", *SEEN_THROUGH):
        raise UserError(
            f"config: attack.kind={kind} is caught by checks of single replies, which "
            f"secure_aggregation hides; use {', '.join(SEEN_THROUGH[:-1])} or {SEEN_THROUGH[-1]}."
        )
    partition, fraction = config.partition, config.federation.fraction
    able_to_train = partition.clients - partition.unlabelled_clients
    asked = max(1, round(fraction * able_to_train))
    if asked < FEWEST_CLIENTS:
        raise UserError(
            f"config: secure_aggregation needs {FEWEST_CLIENTS} clients in a round, and "
            f"federation.fraction={fraction:g} of {able_to_train} clients that train are {asked}; "
            "from a sum of two, each client can compute the other's update."
        )
