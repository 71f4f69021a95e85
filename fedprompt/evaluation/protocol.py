"""The contract of an evaluation protocol: what it holds out, measures, tabulates and draws.

A protocol may hold images out before training (`hold_out`), measure the global model in every
evaluated round (`measure_round`) and measure everything after the last round (`measure`). These
members run on the server. Personal models are measured where their private tensors are:
`measure_clients` runs on the client's side, for a block of clients, and returns numbers only.

`measure` returns plain JSON. `table` and `figure` use nothing but that JSON and the run folder, so
a report can be drawn at any later time, without data, weights or the process that trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedprompt.data.dataset import ImageDataset
from fedprompt.data.held_out import HeldOut
from fedprompt.messages import Ranges
from fedprompt.methods.base import Method, Tensors
from fedprompt.reports.figure import Figure
from fedprompt.reports.format import Table

if TYPE_CHECKING:
    from fedprompt.config.schema import Config
    from fedprompt.reports.run_data import RunData
    from fedprompt.workspace import Workspace

Part = Mapping[str, Any]
"""A protocol's results, as the plain JSON that `Protocol.measure` returned."""
Numbers = dict[str, int | float]
"""What one client reports about its personal model: finite numbers by name."""


@dataclass(frozen=True)
class Finished:
    """A finished run, as `Protocol.measure` sees it.

    Attributes:
        workspace: the server's workspace.
        shared: the final shared tensors, without a client axis.
        clients: what `measure_clients` returned for each client, by client id.
        rounds: the lines of `metrics.jsonl` of all rounds.
        summary: the run's summary, before the results of the protocols are added.
        references: the final shared tensors of the protocol's `references`, by name.
    """

    workspace: Workspace
    shared: Tensors
    clients: Mapping[int, Mapping[str, int | float]]
    rounds: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    references: Mapping[str, Tensors] = field(default_factory=dict)


@dataclass(frozen=True)
class NoOptions:
    """The options class of a protocol without options."""


class Protocol(ABC):
    """One evaluation protocol. A config selects it by the name of its module.

    Args:
        options: an instance of `Options`, built from `protocol_options.<name>`.
        config: the whole experiment.

    Attributes:
        name: the protocol's name, which is the name of its module.
        title: the heading of its table and figure.
        Options: the dataclass of its options.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    caption: ClassVar[str] = ""
    """One line of text under the figure."""
    Options: ClassVar[type[Any]]
    one_of: ClassVar[tuple[str, ...]] = ()
    """Protocols whose results this one reads; at least one of them must run as well."""
    asks_clients: ClassVar[bool] = False
    """Whether the server asks the clients to run `measure_clients` after the last round."""
    needs_global: ClassVar[bool] = False
    """Whether the protocol needs a model that consists of the shared tensors alone."""
    simulation_only: ClassVar[str] = ""
    """What it does that only a simulation can do; a deployment refuses the protocol then."""
    retrains: ClassVar[bool] = False
    """Whether `references` has anything to train, which only a simulation can do."""
    multi_label: ClassVar[bool] = False
    """Whether the results mean something where an image has several labels, for which `accuracy`
    is the mean average precision."""
    transductive: ClassVar[bool] = False
    """Whether the answer to a test image depends on other test images, which are seen without their
    labels. Tables say so, because such results are not comparable with those of other protocols."""
    needs_new_names: ClassVar[bool] = False
    """Whether the protocol needs prompts that can be used with other class names."""

    def __init__(self, options: Any, config: Config) -> None:
        self.options = options
        self.config = config

    @classmethod
    def suits(cls, method: Method) -> bool:
        """Whether the protocol's results are meaningful for this method."""
        if cls.needs_global and not method.has_global:
            return False
        return method.no_transfer_reason is None or not cls.needs_new_names

    @classmethod
    def prepare(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Replace names of config files in the options by the content of the files.

        Args:
            options: the keys of `protocol_options.<name>`.

        Returns:
            The complete options. The function is idempotent: it returns complete options
            unchanged, so the config in a run folder reproduces the run without the files.

        Raises:
            UserError: a name is unknown, or a file is damaged.
        """
        return options

    @property
    def holds_out(self) -> Literal["classes", "domain"] | None:
        """What must be held out before training: classes, a domain, or nothing."""
        return None

    @property
    def takes_held_out(self) -> bool:
        """Whether the protocol can use what another protocol of the run holds out."""
        return False

    def hold_out(self, dataset: ImageDataset) -> tuple[ImageDataset, HeldOut]:
        """Take classes or a domain out of the data set before it is partitioned.

        Called only if `holds_out` is not None.

        Args:
            dataset: the whole data set.

        Returns:
            The data set that is partitioned among the clients, and the part that was held out.

        Raises:
            UserError: the data set has too few classes, domains or test images.
        """
        raise NotImplementedError

    def open(self, workspace: Workspace) -> None:  # noqa: B027
        """Open what `measure` needs, such as other data sets, on the server before round 0.

        A run whose test data are missing then fails before training and not after it.

        Args:
            workspace: the server's workspace.

        Raises:
            UserError: something cannot be found, downloaded or read.
        """

    def references(self, workspace: Workspace) -> Iterator[tuple[str, Workspace]]:
        """Federations that are trained like the run, after its last round, to compare it with.

        Called on the server of a simulation if `retrains` is set. The reference has the strategy,
        the rounds and the seed of the run; `measure` finds its final shared tensors under its name.

        Args:
            workspace: the server's workspace.

        Yields:
            A name, and the workspace in which the reference is trained.
        """
        yield from ()

    def measure_round(
        self, workspace: Workspace, shared: Tensors, line: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Measure the global model on the server, in every evaluated round.

        Args:
            workspace: the server's workspace.
            shared: the shared tensors after the round, without a client axis.
            line: the round's metrics line so far.

        Returns:
            A small JSON object for the metrics line, or None if there is nothing to report.
        """
        return None

    def measure_clients(
        self,
        workspace: Workspace,
        clients: Sequence[int],
        shared: Sequence[Tensors],
        private: Sequence[Tensors],
    ) -> list[Numbers]:
        """Measure personal models on the clients' side, after the last round.

        Args:
            workspace: the workspace of the process in which these clients run.
            clients: ids of the clients of one block.
            shared: per client, the shared tensors that it received, without a client axis.
            private: per client, its private tensors, without a client axis.

        Returns:
            One dict per client, in the order of `clients`, with the names of `client_numbers`.
            They are the whole reply: no prompt, image or prediction leaves the client.
        """
        raise NotImplementedError

    def client_numbers(self, workspace: Workspace) -> Ranges:
        """The numbers that `measure_clients` reports, and within which limits.

        Called on the server if `asks_clients` is set. A client's numbers come from another machine:
        the server reads these names only, and leaves out a client that lacks one of them or exceeds
        its limits, so that no client can make `measure` fail.

        Args:
            workspace: the server's workspace.
        """
        raise NotImplementedError

    def measure(self, run: Finished) -> dict[str, Any] | None:
        """Compute the protocol's results on the server, after the last round.

        Args:
            run: the finished run.

        Returns:
            The results as plain JSON, which are stored in `summary.json`. None for the protocols
            `global` and `personalised`, whose results are top-level keys of the summary.
        """
        return None

    @classmethod
    def table(cls, part: Part) -> Table | None:
        """The table of results for the terminal and the report, or None."""
        return None

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure | None:
        """The protocol's figure.

        Args:
            part: what `measure` returned, as read from `summary.json`.
            run: the contents of the run folder.

        Returns:
            The figure, or None if the protocol has none.
        """
        return None

    @classmethod
    def compare(cls, runs: Sequence[tuple[str, Part]]) -> tuple[Table, Figure] | None:
        """Compare several runs.

        Args:
            runs: the name and the protocol's results of every run.

        Returns:
            One table and one figure of all runs, or None if the protocol has no comparison.
        """
        return None


class Reported(Protocol):
    """A protocol whose `measure`, `table` and `figure` never return None."""

    @abstractmethod
    def measure(self, run: Finished) -> dict[str, Any]:
        """Compute the protocol's results; see `Protocol.measure`."""

    @classmethod
    @abstractmethod
    def table(cls, part: Part) -> Table:
        """The table of results; see `Protocol.table`."""

    @classmethod
    @abstractmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """The protocol's figure; see `Protocol.figure`."""
