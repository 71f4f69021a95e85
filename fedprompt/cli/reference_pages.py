"""Generated pages of the documentation: every config key and every server rule, as Markdown."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Sequence
from typing import Any, get_type_hints

from fedprompt.config.fields import in_words
from fedprompt.config.schema import SECTIONS
from fedprompt.evaluation.registry import all_protocols
from fedprompt.federation.registry import all_strategies
from fedprompt.federation.strategy import StrategyConfig
from fedprompt.methods.registry import all_methods

CONFIG_PAGE = """# Config keys

Every key, with its default. In an experiment file the part before the dot is a heading (`training:` and below it `lr: 0.02`); on the command line a key is written whole, `training.lr=0.02`. How files, names and overrides are put together is in [Experiments](experiments.md).

Generated: `make docs-pages`

Keys outside all sections: `experiment` (the run's name), `seed` (1), `extends` (an experiment file to start from), `protocols` (`[global, personalised]`).
"""  # noqa: E501
STRATEGIES_PAGE = """# Server rules

`strategy=NAME` picks how the server makes new shared prompts of the clients' updates; `strategy=auto`, the default, is the rule of the method's paper (column *server* of [Methods](methods.md)). Each is one file in `strategies/`, whose docstring cites the source and says how we differ. Keys are given with their defaults and stand under `strategy:`.

All of them know `max_norm` and `max_examples_ratio`, by which a reply is refused before any rule sees it.

Generated: `make docs-pages`
"""  # noqa: E501
STRATEGY_NAME = (
    "`strategy.name` left out, or `auto`, is the rule of the method's paper. Keys of all rules, "
    "and below those of each:"
)


def config_markdown() -> str:
    """One table of keys per section, method, server rule and protocol."""
    parts = [CONFIG_PAGE]
    for name, schema in SECTIONS.items():
        parts.append(_section(f"`{name}`", _title(schema), _rows(schema, name)))
    parts.append("## `method`\n\n`method.name`, and the keys of the method that it names.\n")
    for name, method in all_methods().items():
        parts.append(_keys_of(name, method.Config, "method"))
    common = _rows(StrategyConfig, "strategy")
    parts.append(_section("`strategy`", STRATEGY_NAME, common[1:]))
    for name, strategy in all_strategies().items():
        parts.append(_keys_of(name, strategy.Config, "strategy", common))
    parts.append("## `protocol_options`\n\nOptions of the protocols that `protocols` lists.\n")
    for name, protocol in all_protocols().items():
        rows = _rows(protocol.Options, f"protocol_options.{name}")
        parts.append(_section(name, f"{protocol.title}.", rows, level=3))
    return "\n".join(parts)


def strategies_markdown() -> str:
    """One row per server rule: what it does, its keys, the only methods that it is made for."""
    common = {field.name for field in dataclasses.fields(StrategyConfig)}
    lines = []
    for name, cls in all_strategies().items():
        title = _title(sys.modules[cls.__module__])
        keys = [f for f in dataclasses.fields(cls.Config) if f.name not in common]
        shown = ", ".join(f"`{f.name}` {_default(f)}" for f in keys) or "-"
        makers = [m for m, method in all_methods().items() if method.strategy.get("name") == name]
        users = "the others" if name == "fedavg" else ", ".join(makers) or "-"
        lines.append((name, _cell(title), shown, users))
    return f"{STRATEGIES_PAGE}\n{_table(('strategy', 'rule', 'keys', '`auto` for'), lines)}"


def _keys_of(
    name: str, schema: type[Any], where: str, common: Sequence[tuple[str, ...]] = ()
) -> str:
    """A method's or rule's own keys, without `name` and those that are as in `common`."""
    left_out = {f"`{where}.name`", *(row[0] for row in common if row in _rows(schema, where))}
    rows = [row for row in _rows(schema, where) if row[0] not in left_out]
    return _section(name, _title(schema), rows, level=3)


def _section(name: str, text: str, rows: Sequence[tuple[str, ...]], level: int = 2) -> str:
    body = _table(("key", "default", "type", "meaning"), rows) if rows else "No keys.\n"
    return f"{'#' * level} {name}\n\n{text}\n\n{body}"


def _rows(schema: type[Any], where: str) -> list[tuple[str, ...]]:
    kinds = get_type_hints(schema)
    return [
        (
            f"`{where}.{field.name}`",
            _default(field),
            _cell(in_words(kinds[field.name]) + _limits(field)),
            _cell(str(field.metadata.get("help", ""))),
        )
        for field in dataclasses.fields(schema)
    ]


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "-"
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else str(value)
    return f"`{text}`".replace("|", r"\|")


def _limits(field: dataclasses.Field[Any]) -> str:
    words = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
    limits = [f"{s} {field.metadata[k]}" for k, s in words if field.metadata.get(k) is not None]
    return f", {', '.join(limits)}" if limits else ""


def _title(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def _cell(text: str) -> str:
    """Text as it stands, in a cell of a table."""
    for character in "|*[":
        text = text.replace(character, f"\\{character}")
    return text.replace("<", "&lt;")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows)
