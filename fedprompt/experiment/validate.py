"""From nested dicts to a frozen config, and checks that need to know methods and data."""

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
from fedprompt.errors import UserError, did_you_mean
from fedprompt.federation.registry import all_strategies, strategy_class
from fedprompt.privacy.secure_aggregation.params import FEWEST_CLIENTS, SEEN_THROUGH

TOP_LEVEL = (
    "experiment", "seed", "method", "strategy", *SECTIONS, "protocols", "protocol_options"
)  # fmt: skip


def validate(raw: Mapping[str, Any]) -> Config:
    """A frozen `Config` from plain nested dicts; raises `UserError` as `compose` does."""
    from fedprompt.evaluation import registry as protocols
    from fedprompt.federation.registry import strategy_class
    from fedprompt.methods.registry import method_class

    for key in raw:
        if key not in TOP_LEVEL:
            refuse_renamed(str(key))
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
        strategy = {**strategy, **parts["method"].default_strategy}
    rule = str(strategy["name"])
    parts["strategy"] = build(strategy_class(rule).Config, strategy, "strategy")
    possible = parts["method"].supported_strategies
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


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"config: '{name}' must hold keys, got {value!r}.")
    return value


def check_config(config: Config) -> None:
    """Refuse what needs to see single replies, and rounds of too few clients.

    Raises:
        UserError: in one line.
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
            "a sum of two shows each the other's part."
        )
