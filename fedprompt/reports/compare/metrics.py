"""Columns of a comparison: numbers of a run's summary, by a short name or by their path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedprompt.errors import UserError, did_you_mean
from fedprompt.reports.compare.load import Row

Kind = Literal["share", "number", "count", "bytes"]
_PROTOCOL = "protocols.base_to_new.rows"


@dataclass(frozen=True)
class Metric:
    """One column.

    `paths` into summary.json are added up. An element of a list is named by the first value that
    it holds: `rows.personal` is the row whose `model` is `personal`. A `share` is printed in
    percent.
    """

    name: str
    title: str
    paths: tuple[str, ...]
    kind: Kind = "share"
    higher_is_better: bool | None = True

    def value(self, summary: Mapping[str, Any]) -> float | None:
        """The number in one run's summary; None where it was not measured."""
        numbers = [look_up(summary, path) for path in self.paths]
        return None if any(n is None for n in numbers) else float(sum(n or 0 for n in numbers))

    def by_seed(self, row: Row) -> dict[int, float]:
        """The numbers of a row's runs, by seed, those that were not measured left out."""
        found = {seed: self.value(run.summary or {}) for seed, run in sorted(row.runs.items())}
        return {seed: value for seed, value in found.items() if value is not None}


USUAL = (
    Metric("global", "global", ("global.accuracy",)),
    Metric("personal", "personalised", ("personal.mean",)),
    Metric("worst", "worst client", ("personal.worst",)),
    Metric("p10", "10th pct.", ("personal.p10",)),
    Metric("personal_on_global", "personal on global test", ("personal_on_global.mean",)),
)
NEW_CLASSES = tuple(
    Metric(
        f"{name}" if model == "personal" else f"global_{name}",
        f"{title}{', global' if model == 'global' else ''}",
        (f"{_PROTOCOL}.{model}.{name}",),
    )
    for model in ("personal", "global")
    for name, title in (("base", "base"), ("new", "new"), ("harmonic", "harmonic mean"))
)
COSTS = (
    Metric("numbers_up", "numbers up", ("uploaded_numbers_per_client_round",), "count", None),
    Metric("bytes", "MiB sent", ("bytes_up", "bytes_down"), "bytes", None),
)
KNOWN = {metric.name: metric for metric in (*USUAL, *NEW_CLASSES, *COSTS)}


def choose(names: str | None, rows: Sequence[Row]) -> list[Metric]:
    """The columns that `names` asks for, else the usual ones that any run has measured.

    Raises:
        UserError: no run has measured what is asked for.
    """
    if names is None:
        found = [m for m in KNOWN.values() if any(m.by_seed(row) for row in rows)]
        return found
    chosen = [metric(name.strip()) for name in names.split(",")]
    for one in chosen:
        if not any(one.by_seed(row) for row in rows):
            raise UserError(f"compare: no run has measured '{one.name}'.{_hint(one, rows)}")
    return chosen


def metric(name: str) -> Metric:
    """A column by its short name or its path; `:min` after a path says that less is better.

    Raises:
        UserError: neither.
    """
    path, _, direction = name.partition(":")
    if direction not in ("", "min", "max"):
        raise UserError(f"compare: --metrics {name!r}: after ':' comes min or max.")
    if path in KNOWN and not direction:
        return KNOWN[path]
    if "." not in path:
        raise UserError(f"compare: no metric {path!r}.{did_you_mean(path, list(KNOWN))}")
    return Metric(name, path.removeprefix("protocols."), (path,), "number", direction != "min")


def look_up(node: Any, path: str) -> float | None:
    """The number at a dotted path, None where there is none."""
    for part in path.split("."):
        if isinstance(node, list):
            node = next((item for item in node if _name_of(item) == part), None)
        elif isinstance(node, Mapping):
            node = node.get(part)
        else:
            return None
    good = isinstance(node, (int, float)) and not isinstance(node, bool)
    return float(node) if good else None


def _name_of(item: Any) -> str:
    if not isinstance(item, Mapping) or not item:
        return ""
    first = next(iter(item.values()))
    return f"{first:g}" if isinstance(first, (int, float)) else str(first)


def _hint(one: Metric, rows: Sequence[Row]) -> str:
    """Names that would lead further along the path."""
    node: Any = next(iter(rows[0].runs.values())).summary
    for part in one.paths[0].split("."):
        if isinstance(node, list):
            names = [_name_of(item) for item in node]
            following = next((item for item in node if _name_of(item) == part), None)
        elif isinstance(node, Mapping):
            names, following = list(node), node.get(part)
        else:
            return ""
        if following is None:
            return did_you_mean(part, names)
        node = following
    return f" Known: {', '.join(node)}." if isinstance(node, Mapping) else ""
