"""What the shell offers when Tab is pressed (`fedprompt --install-completion`).

Bash breaks words at `=`: for `method=pr` it asks to complete `pr` alone, with `method` and `=` as
separate words before it. Zsh and fish ask to complete the whole word.

The shell starts a new process at every Tab and waits for its answer, so nothing here imports
PyTorch, Flower or Ray.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click
import typer
from typer.completion import (  # type: ignore[attr-defined]  # imported there, not re-exported
    get_completion_script,
    install,
)
from typer.core import TyperGroup

from fedprompt.errors import UserError

Offers = list[str]
SHELLS = ("bash", "zsh", "fish", "powershell", "pwsh")


class CompletionGroup(TyperGroup):
    """A command whose `--install-completion` and `--show-completion` take the name of a shell.

    Typer looks for a shell among the ancestors of the process. There is none under nohup, in a
    container's entry point or on a CI runner, so the shell is named here, or read from $SHELL.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Answer the two options, and leave everything else to Typer."""
        if args[:1] == ["--show-completion"]:
            shell = _shell(args)
            click.echo(
                get_completion_script(
                    prog_name="fedprompt", complete_var="_FEDPROMPT_COMPLETE", shell=shell
                )
            )
            ctx.exit()
        if args[:1] == ["--install-completion"]:
            shell, path = install(shell=_shell(args), prog_name="fedprompt")
            click.echo(f"{shell} completion is installed in {path}; restart the terminal.")
            ctx.exit()
        return super().parse_args(ctx, args)


def _shell(args: Sequence[str]) -> str:
    shell = args[1] if len(args) > 1 else Path(os.environ.get("SHELL", "")).name
    if shell not in SHELLS:
        raise UserError(f"name your shell: fedprompt {args[0]} {'|'.join(SHELLS)}")
    return shell


def complete_experiment(incomplete: str) -> Offers:
    """Offer the shipped experiments."""
    return _starting(_choices("experiment"), incomplete)


def complete_sweep(incomplete: str) -> Offers:
    """Offer the shipped sweeps."""
    return _starting(_choices("sweep"), incomplete)


def complete_suite(incomplete: str) -> Offers:
    """Offer the shipped suites."""
    from fedprompt.config.shipped import shipped_names

    return _starting(shipped_names("suite"), incomplete)


def complete_dataset(incomplete: str) -> Offers:
    """Offer the data sets of the catalogue."""
    from fedprompt.data import catalogue

    return _starting(catalogue.names(), incomplete)


def complete_shown(incomplete: str) -> Offers:
    """Offer what `fedprompt data show` takes: data sets and experiments."""
    return [*complete_dataset(incomplete), *complete_experiment(incomplete)]


def complete_protocol(incomplete: str) -> Offers:
    """Offer the evaluation protocols."""
    return _starting(_choices("protocol"), incomplete)


def complete_override(ctx: typer.Context, incomplete: str) -> Offers:
    """Offer config keys with `=`, then the names or choices that a key may be set to."""
    key, equals, value = incomplete.partition("=")
    if equals:
        return [f"{key}={offer}" for offer in _starting(values_of(key), value)]
    before = [str(word) for word in ctx.params.get("overrides") or []]
    # Bash has split `key=value` into three words, and asks for the last one only.
    if len(before) > 1 and before[-1] == "=":
        return _starting(values_of(before[-2]), incomplete)
    return _starting([f"{key}=" for key in keys(incomplete)], incomplete)


def keys(incomplete: str) -> Offers:
    """Return the config keys that may continue an incomplete one.

    Args:
        incomplete: What has been typed so far. Before its first dot, keys of all sections are
            offered, together with the groups that a name selects.
    """
    from fedprompt.config.schema import SECTIONS, Config
    from fedprompt.data.sources.registry import all_keys

    section = incomplete.partition(".")[0]
    inside = {name: [f.name for f in dataclasses.fields(s)] for name, s in SECTIONS.items()}
    # The keys of `data` depend on the source, which completion does not know yet; it offers them
    # all.
    inside["data"] = list(all_keys())
    if "." in incomplete and section in inside:
        return [f"{section}.{key}" for key in inside[section]]
    offers = []
    for top in dataclasses.fields(Config):
        offers += [f"{top.name}.{key}" for key in inside.get(top.name, ())] or [top.name]
    return [*offers, "backbone", "data"]


def values_of(key: str) -> Offers:
    """Return the values of a key if they are names or a fixed choice, else an empty list."""
    from fedprompt.config.schema import SECTIONS
    from fedprompt.data.sources.registry import SOURCES, key_types
    from fedprompt.experiment.groups import GROUPS

    if key in GROUPS:
        return _choices(key)
    if key == "data.source":
        return SOURCES.names()
    section, _, name = key.partition(".")
    if (section != "data" and section not in SECTIONS) or not name:
        return []
    types = key_types() if section == "data" else get_type_hints(SECTIONS[section])
    kind: Any = types.get(name)
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    # Numbers and free text have no list of values to offer.
    return ["true", "false"] if kind is bool else []


def _choices(group: str) -> Offers:
    """Return the names of a group; none in a damaged installation, which the command reports."""
    from fedprompt.experiment.groups import choices

    try:
        return choices(group)
    except UserError:
        return []


def _starting(names: Sequence[str], incomplete: str) -> Offers:
    return [name for name in names if name.startswith(incomplete)]
