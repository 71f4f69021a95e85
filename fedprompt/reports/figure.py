"""Figures as plain data: what is drawn, without saying how.

A figure is described once, with the dataclasses of this module, and rendered twice: `draw.py` makes
a PNG file of it with matplotlib, and the page of a report draws it with its own script
(`assets/charts.js`), so that a reader can point at values. Accuracies are fractions with the format
"percent"; None means that a value was not measured.

Colours are roles that both renderers translate (`COLOURS` here, `assets/report.css` there): `own`
for clients' own test images, `server` for the server's test set, `alone` for the local-only
baseline, `bars` for counts, and `c0`, `c1`, ... for series without a role.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from fedprompt.reports.figure_ranks import CriticalDifference

Format = Literal["percent", "number", "count", "bytes"]

COLOURS = {
    "own": "#0072b2",
    "server": "#d55e00",
    "alone": "#6b6b6b",
    "bars": "#8d98a5",
    "c0": "#0072b2",
    "c1": "#d55e00",
    "c2": "#009e73",
    "c3": "#b85c93",
    "c4": "#3a9bd0",
    "c5": "#b97f00",
    "c6": "#7a5195",
    "c7": "#6b6b6b",
}
"""The colours of a light page, after Okabe and Ito's palette, which colour-blind readers can tell
apart. A dark page has its own colours in `report.css`."""
PALETTE = 8
MODEL_COLOURS = {"zero-shot": "bars", "global": "server", "personal": "own", "local-only": "alone"}
"""In the figures of protocols, the colour says which model was tested."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of a panel.

    Attributes:
        label: Its name and, where it has one, its unit.
        format: How its values are written.
        low: Its smallest value; None leaves it to the data.
        high: Its largest value; None leaves it to the data.
        log: Whether it is logarithmic; its values are then positive.
        noun: What a reader is told before a value, by default the label: "after 3 KiB".
        names: Names of the values 0, 1, ... on an axis of categories.
    """

    label: str = ""
    format: Format = "number"
    low: float | None = None
    high: float | None = None
    log: bool = False
    noun: str = ""
    names: Sequence[str] = ()


ROUND = Axis(label="Round", format="count")
ACCURACY = Axis(format="percent", low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a line chart.

    Attributes:
        name: Its name in the legend.
        color: The role of its colour.
        x: Positions, in order.
        y: Values, as many as positions.
        spread: Half the height of a band around each value; None at a value without one.
        width: Width of the line in pixels.
        dashed: Whether the line is dashed.
        joined: Whether a line joins the points; else each is a dot.
        notes: A remark about each point, which is shown with it.
        noted: Whether a PNG file writes the notes beside the points; a page always tells them.
        on: Whether the page shows the curve before the reader switches it on.
    """

    name: str
    color: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float | None] | None = None
    width: float = 2.0
    dashed: bool = False
    joined: bool = True
    notes: Sequence[str] = ()
    noted: bool = True
    on: bool = True


@dataclass(frozen=True)
class Level:
    """A dashed horizontal line at one value, e.g. zero-shot accuracy."""

    name: str
    color: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Curves over a common axis.

    Attributes:
        curves: The curves.
        x: The horizontal axis.
        y: The vertical axis.
        levels: Horizontal reference lines.
        nearest: Whether the pointer finds single points; else it finds all values of one x.
        named_at_ends: Whether a PNG file names the curves beside their last values; else it has a
            legend.
        small: Whether the panel is a low one under another.
    """

    kind: ClassVar[str] = "lines"

    curves: Sequence[Curve]
    x: Axis
    y: Axis
    levels: Sequence[Level] = ()
    nearest: bool = False
    named_at_ends: bool = False
    small: bool = False


@dataclass(frozen=True)
class BarSeries:
    """Bars of one colour, one per label; `spread` is half the length of an error bar."""

    name: str
    color: str
    values: Sequence[float | None]
    spread: Sequence[float | None] | None = None


@dataclass(frozen=True)
class Marks:
    """A notch per label, e.g. a reference value for each bar; None where there is none."""

    name: str
    values: Sequence[float | None]


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Bars over labels: side by side, or on top of each other when stacked.

    Attributes:
        labels: What the bars stand for, L of them.
        series: Bars of one colour each, with L values.
        x: The horizontal axis; only its label is used.
        y: The vertical axis, which begins at 0.
        stacked: Whether the series are stacked.
        marks: Notches across the bars.
        levels: Horizontal reference lines.
        noun: What the page says before a label: "Client 3".
        missing: What a cross in place of a bar means, e.g. "not tested"; empty for no crosses.
        notes: Further names and values that the page shows for each label.
        small: Whether the panel is a low one below another.
    """

    kind: ClassVar[str] = "bars"

    labels: Sequence[str]
    series: Sequence[BarSeries]
    x: Axis
    y: Axis
    stacked: bool = False
    marks: Marks | None = None
    levels: Sequence[Level] = ()
    noun: str = ""
    missing: str = ""
    notes: Sequence[Sequence[tuple[str, str]]] = ()
    small: bool = False


@dataclass(frozen=True, kw_only=True)
class Heat:
    """A table of coloured cells.

    Shapes: R rows, C columns.

    Attributes:
        rows: Names of the R rows.
        columns: Names of the C columns.
        cells: (R, C) values.
        name: What a value is.
        format: How a value is written.
        x: What columns are; only label and noun are used.
        y: What rows are; likewise.
        low: The value of the lightest colour; None takes the smallest cell.
        high: The value of the darkest colour; None takes the largest cell.
        root: Whether colour grows with the square root, so that small counts stay visible.
        missing: What the page says of a cell without a value.
        square: Whether rows and columns are the same things, as in a confusion matrix.
    """

    kind: ClassVar[str] = "heat"

    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[float | None]]
    name: str
    format: Format
    x: Axis
    y: Axis
    low: float | None = None
    high: float | None = None
    root: bool = False
    missing: str = "-"
    square: bool = False


@dataclass(frozen=True, kw_only=True)
class Box:
    """The extremes and quartiles of `count` values.

    Attributes:
        name: What the values belong to.
        color: The role of the colour.
        count: How many values there are.
        low: The smallest value; there are no outliers beyond the whiskers.
        q1: The first quartile.
        median: The median.
        q3: The third quartile.
        high: The largest value.
    """

    name: str
    color: str
    count: int
    low: float
    q1: float
    median: float
    q3: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """Horizontal box plots; `noun` says what the values are."""

    kind: ClassVar[str] = "boxes"

    groups: Sequence[Box]
    x: Axis
    noun: str = "values"


Panel = Lines | Bars | Heat | Boxes | CriticalDifference


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure.

    Attributes:
        name: The stem of its file, and the id of its element in a page.
        title: Its title.
        caption: Whole sentences that say what is drawn.
        panels: Its parts, from top to bottom.
        wide: Whether a page gives it the whole width.
    """

    name: str
    title: str
    caption: str
    panels: Sequence[Panel]
    wide: bool = False

    def spec(self) -> list[dict[str, Any]]:
        """Return what the page's script reads: every panel as JSON values."""
        return [{"kind": panel.kind, **asdict(panel)} for panel in self.panels]


def palette(i: int) -> str:
    """Return the colour role of the i-th series; the colours repeat after `PALETTE` series."""
    return f"c{i % PALETTE}"
