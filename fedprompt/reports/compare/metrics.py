"""The columns of a comparison: numbers of a run's summary, selected by a name or by a path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedprompt.errors import UserError, did_you_mean
from fedprompt.reports.compare.load import Row

Kind = Literal["share", "number", "count", "bytes", "seconds"]
_PROTOCOL = "protocols.base_to_new.rows"


@dataclass(frozen=True)
class Metric:
    """One column.

    Attributes:
        name: How the user selects it.
        title: Its heading in tables.
        paths: Paths into summary.json, whose numbers are added up. An element of a list is selected
            by the first value in it: `rows.personal` is the row whose `model` is `personal`.
        kind: How its numbers are printed; a `share` in [0, 1] is printed in percent.
        higher_is_better: None if no value is better than another, e.g. for a cost.
    """

    name: str
    title: str
    paths: tuple[str, ...]
    kind: Kind = "share"
    higher_is_better: bool | None = True

    def value(self, summary: Mapping[str, Any]) -> float | None:
        """Return the number in one run's summary, None if it was not measured."""
        numbers = [look_up(summary, path) for path in self.paths]
        return None if any(n is None for n in numbers) else float(sum(n or 0 for n in numbers))

    def by_seed(self, row: Row) -> dict[int, float]:
        """Return the numbers of a row's runs by seed, without those that were not measured."""
        found = {seed: self.value(run.summary or {}) for seed, run in sorted(row.runs.items())}
        return {seed: value for seed, value in found.items() if value is not None}


USUAL = (
    Metric("global", "global", ("global.accuracy",)),
    Metric("personal", "personalised", ("personal.mean",)),
    Metric("worst", "worst client", ("personal.worst",)),
    Metric("p10", "10th pct.", ("personal.p10",)),
    Metric("personal_on_global", "personal on global test", ("personal_on_global.mean",)),
    Metric("attack_success", "attack success", ("backdoor.success",), higher_is_better=False),
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
    Metric("simulated_seconds", "simulated s", ("simulated_seconds",), "seconds", None),
)
ON_REQUEST = (
    Metric("client_steps", "client steps", ("client_steps",), "count", None),
    Metric("seconds", "seconds", ("seconds",), "seconds", None),
    Metric("peak_memory", "peak MiB", ("peak_memory_bytes",), "bytes", None),
)
"""Further costs; only tables that ask for them show them."""
KNOWN = {metric.name: metric for metric in (*USUAL, *NEW_CLASSES, *COSTS, *ON_REQUEST)}


def choose(names: str | None, rows: Sequence[Row]) -> list[Metric]:
    """Select the columns of a comparison.

    Args:
        names: Names or paths of metrics, separated by commas; None selects the known metrics that
            any run has measured, without those in `ON_REQUEST`.
        rows: The rows of the comparison.

    Raises:
        UserError: A name is unknown, or no run has measured what it stands for.
    """
    if names is None:
        usual = [metric for metric in KNOWN.values() if metric not in ON_REQUEST]
        return [metric for metric in usual if any(metric.by_seed(row) for row in rows)]
    chosen = [metric(name.strip()) for name in names.split(",")]
    for one in chosen:
        if not any(one.by_seed(row) for row in rows):
            raise UserError(f"compare: no run has measured '{one.name}'.{_hint(one, rows)}")
    return chosen


def metric(name: str) -> Metric:
    """Return a column by its short name or its path.

    Args:
        name: A key of `KNOWN`, or a dotted path, optionally followed by `:min` or `:max` to say
            which values are better. By default larger ones are.

    Raises:
        UserError: It is neither a known name nor a path.
    """
    path, _, direction = name.partition(":")
    if direction not in ("", "min", "max"):
        raise UserError(f"compare: --metrics {name!r}: after ':' comes min or max.")
    if path in KNOWN and not direction:
        return KNOWN[path]
    if "." not in path:
        raise UserError(f"compare: no metric {path!r}.{did_you_mean(path, list(KNOWN))}")
    # Nothing is known about a value selected by path, so it is printed as a plain number.
    return Metric(name, path.removeprefix("protocols."), (path,), "number", direction != "min")


def look_up(node: Any, path: str) -> float | None:
    """Return the number at a dotted path, None if there is none.

    Args:
        node: The content of summary.json.
        path: Keys of objects, and names of list elements (see `Metric.paths`).
    """
    for part in path.split("."):
        if isinstance(node, list):
            node = next((item for item in node if _name_of(item) == part), None)
        elif isinstance(node, Mapping):
            node = node.get(part)
        else:
            return None
    # A bool is an int in Python, but no measurement.
    good = isinstance(node, (int, float)) and not isinstance(node, bool)
    return float(node) if good else None


def _name_of(item: Any) -> str:
    """Return the first value of a list element, by which a path selects it."""
    if not isinstance(item, Mapping) or not item:
        return ""
    first = next(iter(item.values()))
    # `:g` lets a path name the row of 16 shots as `16`, whether it is stored as 16 or 16.0.
    return f"{first:g}" if isinstance(first, (int, float)) else str(first)


def _hint(one: Metric, rows: Sequence[Row]) -> str:
    """List the names that would continue the path from where it leads nowhere."""
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
