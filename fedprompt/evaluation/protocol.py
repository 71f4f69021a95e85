"""The contract of an evaluation protocol: what it holds out and measures, its table and figure.

A protocol may hold images out before training (`hold_out`), measure the global model in every
evaluated round (`measure_round`) and measure everything at the end (`measure`). Personal models are
measured where their private tensors are: `measure_clients` runs on the client's side, for a block
of clients, and only numbers come back. `measure` returns plain JSON. `table` and `figure` are made
from that JSON alone, so that a report can be drawn from a run folder at any later time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedprompt.data.dataset import ImageDataset
from fedprompt.data.held_out import HeldOut
from fedprompt.methods.base import Method, Tensors
from fedprompt.reports.figure import Figure
from fedprompt.reports.format import Table

if TYPE_CHECKING:
    from fedprompt.config.schema import Config
    from fedprompt.reports.run_data import RunData
    from fedprompt.workspace import Workspace

Part = Mapping[str, Any]
"""A protocol's results as plain JSON."""
Numbers = dict[str, int | float]
"""What one client reports about its own model: finite numbers by name."""


@dataclass(frozen=True)
class Finished:
    """What a protocol may use when a run ends.

    Attributes:
        workspace: the server's.
        shared: the final shared tensors, without a client axis.
        clients: what `measure_clients` returned for each client, by client id.
        rounds: the metrics lines of all rounds.
        summary: the run's summary without the protocols' parts.
    """

    workspace: Workspace
    shared: Tensors
    clients: Mapping[int, Mapping[str, int | float]]
    rounds: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class NoOptions:
    """The options of a protocol that has none."""


class Protocol(ABC):
    """One evaluation protocol. Its module's name selects it; nothing else knows its name.

    Args:
        options: its `Options`, built from `protocol_options.<name>`.
        config: the whole experiment.

    Attributes:
        name: the protocol's name, which is that of its module.
        title: heading of its table and figure.
        Options: dataclass of its options.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    caption: ClassVar[str] = ""
    """One line under the figure."""
    Options: ClassVar[type[Any]]
    one_of: ClassVar[tuple[str, ...]] = ()
    """Protocols of which at least one must run too, since this one reads their results."""
    asks_clients: ClassVar[bool] = False
    """Whether clients are asked for `measure_clients`."""
    needs_global: ClassVar[bool] = False
    """Whether it needs a model of the shared tensors alone."""
    needs_new_names: ClassVar[bool] = False
    """Whether it needs tensors that can be used with other class names."""

    def __init__(self, options: Any, config: Config) -> None:
        self.options = options
        self.config = config

    @classmethod
    def suits(cls, method: Method) -> bool:
        """Whether its results mean something for this method."""
        if cls.needs_global and not method.has_global:
            return False
        return method.no_transfer_reason is None or not cls.needs_new_names

    @classmethod
    def prepare(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Replace names of config files in the options by the files' content.

        Args:
            options: the keys of `protocol_options.<name>`.

        Returns:
            The complete options. Calling it again with these changes nothing, so that a run
            folder's config reproduces the run without the files.

        Raises:
            UserError: an unknown name or a damaged file.
        """
        return options

    @property
    def holds_out(self) -> Literal["classes", "domain"] | None:
        """Whether classes or a domain must be held out before training."""
        return None

    @property
    def takes_held_out(self) -> bool:
        """Whether it can reuse another protocol's held-out split."""
        return False

    def hold_out(self, dataset: ImageDataset) -> tuple[ImageDataset, HeldOut]:
        """Take classes or a domain out of the data set; only called if `holds_out` is not None.

        Args:
            dataset: the whole data set.

        Returns:
            The data set that is dealt to clients, and the part that was held out.

        Raises:
            UserError: the data set has too few classes, domains or test images.
        """
        raise NotImplementedError

    def open(self, workspace: Workspace) -> None:  # noqa: B027
        """Open what `measure` needs, e.g. other data sets, on the server before the first round.

        A run then fails in its first minute and not at its end.

        Args:
            workspace: the server's.

        Raises:
            UserError: something cannot be found, downloaded or read.
        """

    def measure_round(
        self, workspace: Workspace, shared: Tensors, line: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Measure the global model in an evaluated round.

        Args:
            workspace: the server's.
            shared: the shared tensors after the round, without a client axis.
            line: the round's metrics line so far.

        Returns:
            A small JSON object for the metrics line, or None.
        """
        return None

    def measure_clients(
        self,
        workspace: Workspace,
        clients: Sequence[int],
        shared: Sequence[Tensors],
        private: Sequence[Tensors],
    ) -> list[Numbers]:
        """Measure personal models, on the clients' side and after the last round.

        Args:
            workspace: what the process of these clients holds.
            clients: ids of the clients of one block.
            shared: per client, the shared tensors that it received, without a client axis.
            private: per client, its private tensors, without a client axis.

        Returns:
            One dict per client, in the order given, with the same names in all of them.
        """
        raise NotImplementedError

    def measure(self, run: Finished) -> dict[str, Any] | None:
        """Measure what the protocol reports, after the last round.

        Args:
            run: the finished run.

        Returns:
            Its part of `summary.json` as plain JSON, or None for protocols whose results have
            keys of their own in metrics and summary.
        """
        return None

    @classmethod
    def table(cls, part: Part) -> Table | None:
        """The table of results, for the terminal and the report; None if there is none."""
        return None

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure | None:
        """The protocol's figure, or None.

        Args:
            part: what `measure` returned, read from `summary.json`.
            run: the run folder's content.
        """
        return None

    @classmethod
    def compare(cls, runs: Sequence[tuple[str, Part]]) -> tuple[Table, Figure] | None:
        """Compare several runs.

        Args:
            runs: name and results of every run.

        Returns:
            One table and one figure of all runs, or None if the protocol has no comparison.
        """
        return None


class Reported(Protocol):
    """A protocol that must report: `measure`, `table` and `figure` never return None."""

    @abstractmethod
    def measure(self, run: Finished) -> dict[str, Any]:
        """The part of `summary.json`."""

    @classmethod
    @abstractmethod
    def table(cls, part: Part) -> Table:
        """The results for the terminal and the report."""

    @classmethod
    @abstractmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """The one figure of this protocol."""
