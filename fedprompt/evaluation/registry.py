"""Evaluation protocols by name: building their options and collecting their results.

The config checks use it before a run (`build_options`, `who_holds_out`), every participant when it
opens its data (`hold_out`), and reports when they draw a run folder (`result_tables`, `figures`,
`compare_runs`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
from fedprompt.reports.score_names import ACCURACY, called, one_name

if TYPE_CHECKING:
    from fedprompt.config.schema import Config

__all__ = [
    "DEFAULT",
    "Finished",
    "Protocol",
    "Table",
    "all_protocols",
    "build_options",
    "comparable",
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
    """All protocols by name. This imports all of their modules."""
    return PROTOCOLS.all()


def protocol_class(name: str) -> type[Protocol]:
    """The protocol called `name`.

    Raises:
        UserError: there is no such protocol; the message suggests the nearest name.
    """
    return PROTOCOLS.get(name)


def build_options(names: Any, options: Any) -> tuple[list[str], dict[str, Any]]:
    """Check the `protocols` and `protocol_options` of a config.

    Args:
        names: the names of the protocols that run, as they stand in the config.
        options: the options by protocol, or None. Options of protocols that do not run are
            checked as well, but dropped.

    Returns:
        The names, and the built options of each protocol by name.

    Raises:
        UserError: a name is unknown or repeated, an option is wrong, or a protocol runs without
            the one whose results it reads.
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
    # Options of protocols that do not run are built too: a wrong key should not go unnoticed until
    # the protocol is switched on.
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
    """Create the protocols of an experiment, in the order of its config."""
    return [
        protocol_class(name)(config.protocol_options[name], config) for name in config.protocols
    ]


def who_holds_out(protocols: Sequence[Protocol]) -> Protocol | None:
    """Find the protocol that decides what is held out before training.

    Args:
        protocols: the protocols of an experiment.

    Returns:
        The protocol, or None if nothing is held out.

    Raises:
        UserError: two protocols hold something out, and neither can use what the other holds out.
    """
    holders = [p for p in protocols if p.holds_out]
    # Protocols that can use another one's split come last, so they decide only if no other does.
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

    Every participant calls it on its own copy of the data set. The result depends on the config
    and the data alone, so all of them get the same split.

    Args:
        config: the experiment.
        dataset: the whole data set.

    Returns:
        The data set that is partitioned among the clients, and the held-out part or None.

    Raises:
        UserError: the data set has too few classes, domains or test images.
    """
    holder = who_holds_out(open_protocols(config))
    return holder.hold_out(dataset) if holder is not None else (dataset, None)


def measured(summary: Mapping[str, Any]) -> list[tuple[type[Protocol], Mapping[str, Any]]]:
    """The protocols that have results in a run's summary, each with its results.

    Args:
        summary: the run's summary.

    Returns:
        Protocol classes and results, in the order of the summary. Results of a protocol that is
        not installed here are left out.
    """
    parts = summary.get("protocols") or {}
    known = all_protocols()
    return [(known[name], part) for name, part in parts.items() if name in known]


def result_tables(summary: Mapping[str, Any], source: str) -> list[Table]:
    """Make the tables of a run's protocols.

    Args:
        summary: the run's summary.
        source: where the summary comes from, for messages.

    Returns:
        The tables, in the order of the summary.

    Raises:
        UserError: the results of a protocol are damaged.
    """
    tables = [(cls, read(cls, source, cls.table, part)) for cls, part in measured(summary)]
    score = str(summary.get("score") or ACCURACY)
    return [called(score, _named(cls, table)) for cls, table in tables if table is not None]


def _named(cls: type[Protocol], table: Table) -> Table:
    """The table, whose title says if its results are transductive."""
    return replace(table, title=f"{table.title} (transductive)") if cls.transductive else table


def figures(run: RunData) -> list[Figure]:
    """Make the figures of a run's protocols.

    Args:
        run: the contents of a run folder, finished or not.

    Returns:
        The figures, each with the name of its protocol, in the order of the summary.

    Raises:
        UserError: the results of a protocol are damaged.
    """
    source = str(run.path / SUMMARY)
    figures = [
        read(cls, source, cls.figure, part, run) for cls, part in measured(run.summary or {})
    ]
    return [called(run.score, figure) for figure in figures if figure is not None]


def comparable() -> list[str]:
    """Names of the protocols that have a comparison of runs."""
    return [name for name, cls in all_protocols().items() if "compare" in vars(cls)]


def compare_runs(
    name: str, runs: Sequence[RunData], labels: Sequence[str] = ()
) -> tuple[Table, Figure]:
    """Compare the results of one protocol over several runs.

    Args:
        name: the name of the protocol.
        runs: the contents of the run folders.
        labels: what each run is called, such as a sweep's row; by default the run's folder.

    Returns:
        One table and one figure of all runs.

    Raises:
        UserError: the protocol has no comparison, or a run has no or damaged results of it.
    """
    cls = protocol_class(name)
    parts = []
    names = labels or [run.path.name for run in runs]
    for run, label in zip(runs, names, strict=True):
        part = (run.summary or {}).get("protocols", {}).get(name)
        if part is None:
            raise UserError(f"{run.path} holds no results of protocol '{name}'.")
        parts.append((label, part))
    comparison = read(cls, "one of these runs", cls.compare, parts)
    if comparison is None:
        raise UserError(
            f"protocol '{name}' has no comparison of runs; these have: {', '.join(comparable())}."
        )
    table, figure = comparison
    return called(one_name(run.score for run in runs), (_named(cls, table), figure))


def read(cls: type[Protocol], source: str, make: Callable[..., T], *arguments: Any) -> T:
    """Make a table or figure from a protocol's stored results.

    Args:
        cls: the protocol.
        source: where the results come from, for messages.
        make: the function that makes the table or figure.
        *arguments: the arguments of `make`.

    Returns:
        What `make` returns.

    Raises:
        UserError: the results are damaged, so that `make` fails.
    """
    # A summary may be edited by hand or come from another version. Protocols index it without
    # checks, so any of these errors means that a key is missing or has another type.
    try:
        return make(*arguments)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"{source} is damaged: 'protocols.{cls.name}' is not what that protocol writes "
            f"({type(error).__name__}: {error})."
        ) from None
