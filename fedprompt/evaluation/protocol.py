"""What an evaluation protocol is: what it holds out, what it measures, its table and its figure.

A protocol may hold images out before anything is trained (`hold_out`), measure the global model in
every evaluated round (`measure_round`) and everything once more at the end (`measure`). Personal
models are measured where their private tensors are: `measure_clients` runs on the client's side,
on a block at once, and only numbers come back. What `measure` returns is plain JSON; `table` and
`figure` are made from that JSON alone, so that a report can be drawn anew from a run folder.
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
"""What one client tells the server about its own model: names and finite numbers."""


@dataclass(frozen=True)
class Finished:
    """What a protocol may look at when a run ends.

    `clients` holds what each client's `measure_clients` gave, by client id; `rounds` the metrics
    lines of all rounds; `summary` the run's summary without the protocols' parts.
    """

    workspace: Workspace
    shared: Tensors
    clients: Mapping[int, Mapping[str, int | float]]
    rounds: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class NoOptions:
    """The options of a protocol that leaves nothing to choose."""


class Protocol(ABC):
    """One protocol, one module. Subclasses are found by module; nothing else knows their names."""

    name: ClassVar[str]
    title: ClassVar[str]
    caption: ClassVar[str] = ""
    """One line under the figure."""
    Options: ClassVar[type[Any]]
    one_of: ClassVar[tuple[str, ...]] = ()
    """Protocols of which one must run beside this one, since it reads their results."""
    asks_clients: ClassVar[bool] = False
    """Whether `measure_clients` gives anything."""
    needs_global: ClassVar[bool] = False
    """Whether it says nothing without a model of the shared tensors alone."""
    needs_new_names: ClassVar[bool] = False
    """Whether it says nothing where the tensors mean nothing for other class names."""

    def __init__(self, options: Any, config: Config) -> None:
        self.options = options
        self.config = config

    @classmethod
    def suits(cls, method: Method) -> bool:
        """Whether it says something about this method."""
        if cls.needs_global and not method.has_global:
            return False
        return method.no_transfer_reason is None or not cls.needs_new_names

    @classmethod
    def prepare(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Options with names of config files replaced by what these hold; must be idempotent."""
        return options

    @property
    def holds_out(self) -> Literal["classes", "domain"] | None:
        """What this protocol needs to be held out before training."""
        return None

    @property
    def takes_held_out(self) -> bool:
        """Whether it would as soon use what another protocol of the run holds out."""
        return False

    def hold_out(self, dataset: ImageDataset) -> tuple[ImageDataset, HeldOut]:
        """The data set that is dealt to clients, and what was taken from it.

        Raises:
            UserError: the data set has not enough classes or domains.
        """
        raise NotImplementedError

    def open(self, workspace: Workspace) -> None:  # noqa: B027
        """Get what the end needs (other data sets, ...), on the server before the first round.

        Raises:
            UserError: it cannot be had.
        """

    def measure_round(
        self, workspace: Workspace, shared: Tensors, line: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """A small part for the metrics line of an evaluated round, which so far is `line`."""
        return None

    def measure_clients(
        self,
        workspace: Workspace,
        clients: Sequence[int],
        shared: Sequence[Tensors],
        private: Sequence[Tensors],
    ) -> list[Numbers]:
        """On the clients' side: each client's numbers, the same names for all; in order."""
        raise NotImplementedError

    def measure(self, run: Finished) -> dict[str, Any] | None:
        """The part of `summary.json`; None where the usual results already say it all."""
        return None

    @classmethod
    def table(cls, part: Part) -> Table | None:
        """The results for the terminal and the report."""
        return None

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure | None:
        """The one figure of this protocol."""
        return None

    @classmethod
    def compare(cls, runs: Sequence[tuple[str, Part]]) -> tuple[Table, Figure] | None:
        """Several runs, by name, in one table and figure; None where there is nothing to join."""
        return None


class Reported(Protocol):
    """A protocol with results of its own: what it measures, its table and its figure."""

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
