"""Evaluation protocols by name: their options, what they hold out, their tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from fedprompt.config.fields import build
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.held_out import HeldOut
from fedprompt.errors import UserError
from fedprompt.evaluation.protocol import Finished, Protocol
from fedprompt.evaluation.protocols import PROTOCOLS
from fedprompt.reports.figure import Figure
from fedprompt.reports.format import Table
from fedprompt.reports.run_data import SUMMARY, RunData

if TYPE_CHECKING:
    from fedprompt.config.schema import Config

__all__ = [
    "DEFAULT",
    "Finished",
    "Protocol",
    "Table",
    "all_protocols",
    "build_options",
    "compare_runs",
    "figures",
    "hold_out",
    "measured",
    "open_protocols",
    "protocol_class",
    "read",
    "result_tables",
]

T = TypeVar("T")

DEFAULT = ("global", "personalised")


def all_protocols() -> dict[str, type[Protocol]]:
    """Every protocol by name; imports all of them."""
    return PROTOCOLS.all()


def protocol_class(name: str) -> type[Protocol]:
    """The protocol called `name`.

    Raises:
        UserError: there is no such protocol; the message has the nearest name.
    """
    return PROTOCOLS.get(name)


def build_options(names: Any, options: Any) -> tuple[list[str], dict[str, Any]]:
    """Check the `protocols` and `protocol_options` of a config.

    Args:
        names: names of the protocols that run.
        options: options by protocol, or None. Those of protocols that do not run are checked too,
            and dropped.

    Returns:
        The names, and the built options of each.

    Raises:
        UserError: an unknown or repeated name, wrong options, or a protocol without the one whose
            results it reads.
    """
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
        raise UserError(f"config: protocols is {names!r}; it must be a list of names.")
    if not names:
        raise UserError(f"config: protocols is empty; the usual ones are {list(DEFAULT)}.")
    given = {} if options is None else options
    if not isinstance(given, Mapping):
        raise UserError(
            f"config: protocol_options is {options!r}; it must hold a key per protocol."
        )
    built: dict[str, Any] = {}
    for name in [*names, *given]:
        cls = protocol_class(str(name))
        values = given.get(name) or {}
        where = f"protocol_options.{name}"
        if not isinstance(values, Mapping):
            raise UserError(f"config: {where} is {values!r}; it must hold keys.")
        built[name] = build(cls.Options, cls.prepare(values), where)
        read_from = cls.one_of
        if name in names and read_from and not set(read_from) & set(names):
            raise UserError(
                f"config: protocol '{name}' reads the results of {' or '.join(read_from)}; add it "
                "to protocols."
            )
    if len(set(names)) < len(names):
        raise UserError(f"config: protocols {list(names)} names one of them twice.")
    return list(names), {name: built[name] for name in names}


def open_protocols(config: Config) -> list[Protocol]:
    """The protocols of an experiment, in the order of its config."""
    return [
        protocol_class(name)(config.protocol_options[name], config) for name in config.protocols
    ]


def who_holds_out(protocols: Sequence[Protocol]) -> Protocol | None:
    """The protocol that holds something out, or None.

    Raises:
        UserError: two protocols hold something out, and neither can reuse the other's split.
    """
    holders = [p for p in protocols if p.holds_out]
    # A protocol that can reuse another's split comes last, and so never decides on the split.
    holders.sort(key=lambda p: p.takes_held_out)
    for other in holders[1:]:
        if not other.takes_held_out or other.holds_out != holders[0].holds_out:
            raise UserError(
                f"config: protocols '{holders[0].name}' and '{other.name}' both hold something out "
                "before training; a run can have one such protocol. Use two runs, or give "
                f"protocol_options.{other.name} a data set of its own where it takes one."
            )
    return holders[0] if holders else None


def hold_out(config: Config, dataset: ImageDataset) -> tuple[ImageDataset, HeldOut | None]:
    """Hold out what a protocol of the experiment asks for.

    Args:
        config: the experiment.
        dataset: the whole data set.

    Returns:
        The data set that is dealt to the clients, and the held-out part or None.

    Raises:
        UserError: the data set has too few classes, domains or test images.
    """
    holder = who_holds_out(open_protocols(config))
    return holder.hold_out(dataset) if holder is not None else (dataset, None)


def measured(summary: Mapping[str, Any]) -> list[tuple[type[Protocol], Mapping[str, Any]]]:
    """Protocols with results of their own in a run's summary, with these results, in order.

    Results of a protocol that is not installed are left out.
    """
    parts = summary.get("protocols") or {}
    known = all_protocols()
    return [(known[name], part) for name, part in parts.items() if name in known]


def result_tables(summary: Mapping[str, Any], source: str) -> list[Table]:
    """The tables of a run's protocols.

    Args:
        summary: the run's summary.
        source: where the summary comes from, for messages.

    Raises:
        UserError: the results of a protocol are damaged.
    """
    tables = [read(cls, source, cls.table, part) for cls, part in measured(summary)]
    return [table for table in tables if table is not None]


def figures(run: RunData) -> list[Figure]:
    """The figures of a run's protocols, named like them, in the order of its summary.

    Raises:
        UserError: a protocol's results are not what it writes.
    """
    source = str(run.path / SUMMARY)
    figures = [
        read(cls, source, cls.figure, part, run) for cls, part in measured(run.summary or {})
    ]
    return [figure for figure in figures if figure is not None]


def compare_runs(name: str, runs: Sequence[RunData]) -> tuple[Table, Figure]:
    """Compare the results of one protocol over several runs.

    Args:
        name: the protocol.
        runs: the runs.

    Returns:
        One table and one figure of all runs.

    Raises:
        UserError: the protocol has no comparison, or a run has no results of it.
    """
    cls = protocol_class(name)
    parts = []
    for run in runs:
        part = (run.summary or {}).get("protocols", {}).get(name)
        if part is None:
            raise UserError(f"{run.path} holds no results of protocol '{name}'.")
        parts.append((run.path.name, part))
    comparison = read(cls, "one of these runs", cls.compare, parts)
    if comparison is None:
        comparable = [n for n, c in all_protocols().items() if "compare" in vars(c)]
        raise UserError(
            f"protocol '{name}' has no comparison of runs; these have: {', '.join(comparable)}."
        )
    return comparison


def read(cls: type[Protocol], source: str, make: Callable[..., T], *arguments: Any) -> T:
    """Make a table or figure of a protocol's stored results.

    Args:
        cls: the protocol.
        source: where the results come from, for messages.
        make: makes the table or figure.
        arguments: its arguments.

    Raises:
        UserError: the results are damaged, so that `make` fails.
    """
    try:
        return make(*arguments)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"{source} is damaged: 'protocols.{cls.name}' is not what that protocol writes "
            f"({type(error).__name__}: {error})."
        ) from None
