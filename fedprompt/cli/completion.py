"""What the shell offers when Tab is pressed (`fedprompt --install-completion`).

Bash breaks words at `=`: it asks for the value of `method=pr` with `pr` alone, after `method` and
`=`. Zsh and fish ask with the whole word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer

from fedprompt.errors import UserError

Offers = list[str]


def complete_experiment(incomplete: str) -> Offers:
    """Shipped experiments."""
    from fedprompt.data.sections import available

    return _starting(available("experiment"), incomplete)


def complete_sweep(incomplete: str) -> Offers:
    """Shipped sweeps."""
    from fedprompt.data.sections import available

    return _starting(available("sweep"), incomplete)


def complete_dataset(incomplete: str) -> Offers:
    """Data sets of the catalogue."""
    from fedprompt.data import catalogue

    return _starting(catalogue.names(), incomplete)


def complete_shown(incomplete: str) -> Offers:
    """What `fedprompt data show` takes: data sets and experiments."""
    return [*complete_dataset(incomplete), *complete_experiment(incomplete)]


def complete_protocol(incomplete: str) -> Offers:
    """Evaluation protocols."""
    from fedprompt.evaluation.registry import all_protocols

    return _starting(list(all_protocols()), incomplete)


def complete_override(ctx: typer.Context, incomplete: str) -> Offers:
    """Config keys with `=`, and the names or choices that a key may be set to."""
    key, equals, value = incomplete.partition("=")
    if equals:
        return [f"{key}={offer}" for offer in _starting(values_of(key), value)]
    before = [str(word) for word in ctx.params.get("overrides") or []]
    if len(before) > 1 and before[-1] == "=":
        return _starting(values_of(before[-2]), incomplete)
    return _starting([f"{key}=" for key in keys(incomplete)], incomplete)


def keys(begun: str) -> Offers:
    """Config keys: groups and sections, then what is inside the one that was begun."""
    from fedprompt.config.schema import SECTIONS
    from fedprompt.experiment.validate import TOP_LEVEL

    section = begun.partition(".")[0]
    if "." in begun and section in SECTIONS:
        return [f"{section}.{field.name}" for field in dataclasses.fields(SECTIONS[section])]
    found = []
    for name in TOP_LEVEL:
        inside = dataclasses.fields(SECTIONS[name]) if name in SECTIONS else ()
        found += [f"{name}.{field.name}" for field in inside] or [name]
    return [*found, "backbone", "data"]


def values_of(key: str) -> Offers:
    """What a key may be set to, where that is a choice of names; else nothing."""
    from fedprompt.config.schema import SECTIONS
    from fedprompt.data.sections import available
    from fedprompt.experiment.compose import GROUPS

    if key in GROUPS:
        return available(key)
    section, _, name = key.partition(".")
    if section not in SECTIONS or not name:
        return []
    return _choices(get_type_hints(SECTIONS[section]).get(name))


def _choices(kind: Any) -> Offers:
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    if kind is bool:
        return ["true", "false"]
    return []


def _starting(names: Sequence[str], incomplete: str) -> Offers:
    try:
        return [name for name in names if name.startswith(incomplete)]
    except UserError:  # a broken installation is for the command itself to report
        return []
