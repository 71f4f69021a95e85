"""Draws critical-difference diagrams with matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedprompt.reports.draw_style import GREY, INK, PALE_GREY, shorten
from fedprompt.reports.figure import COLOURS
from fedprompt.reports.figure_ranks import CriticalDifference

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW_IN = 0.165
"""Height of a row with a name, in inches; the unit of all heights here."""
RULER, AXIS, FIRST_GROUP, GROUP_STEP = 0.9, 2.4, 3.0, 0.4
LETTER = 0.0112
"""Width of a letter, as a fraction of the width of the panel."""
NAME_LETTERS = 20
"""Maximum length of a name, in characters: names stand on both sides of the axis."""
MOST_TICKS = 12


def ranks_height(panel: CriticalDifference) -> float:
    """Return the height of a diagram in inches."""
    return ROW_IN * (_first_name(panel) + (len(panel.names) + 1) // 2)


def draw_ranks(axes: Axes, panel: CriticalDifference) -> None:
    """Draw the axis of ranks, the bars of the groups, and the names on both sides.

    Each name has a row of its own, so that no two names overlap, however many there are. The best
    of the left side and the worst of the right side are at the top: so no line to a name crosses
    another one.

    Args:
        axes: Where to draw.
        panel: What to draw.
    """
    axes.set(xlim=(0, 1), ylim=(ranks_height(panel) / ROW_IN, 0))
    axes.axis("off")
    count = len(panel.names)
    texts = [
        f"{shorten(name, NAME_LETTERS)}  {rank:.2f}"
        for name, rank in zip(panel.names, panel.ranks, strict=True)
    ]
    room = LETTER * max(map(len, texts)) + 0.02

    def place(rank: float) -> float:
        return room + (1 - 2 * room) * (rank - 1) / max(1, count - 1)

    _draw_axis(axes, panel, [place(rank) for rank in (1, 1 + panel.difference, count)])
    for tick in _ticks(count):
        axes.plot([place(tick)] * 2, [AXIS - 0.25, AXIS], color=INK, lw=1)
        axes.text(
            place(tick), AXIS - 0.4, f"{tick}", ha="center", va="bottom", fontsize=8, color=INK
        )
    half = (count + 1) // 2
    first = _first_name(panel)
    for i, (text, rank) in enumerate(zip(texts, panel.ranks, strict=True)):
        left = i < half
        y = first + (i if left else count - 1 - i) + 0.5
        edge = room if left else 1 - room
        axes.plot([place(rank), place(rank), edge], [AXIS, y, y], color=PALE_GREY, lw=0.8, zorder=1)
        axes.text(
            edge - 0.01 if left else edge + 0.01, y, text, ha="right" if left else "left",
            va="center", fontsize=8, color=INK, parse_math=False,
        )  # fmt: skip
    for k, (start, end) in enumerate(panel.groups):
        y = FIRST_GROUP + k * GROUP_STEP
        ends = [place(panel.ranks[start]) - 0.006, place(panel.ranks[end]) + 0.006]
        axes.plot(ends, [y, y], color=COLOURS["own"], lw=2.6, solid_capstyle="butt", zorder=3)


def _draw_axis(axes: Axes, panel: CriticalDifference, places: list[float]) -> None:
    """Draw the axis, and above it the critical difference as a ruler where there is room for it."""
    first, ruled, last = places
    axes.plot([first, last], [AXIS, AXIS], color=INK, lw=1.2)
    text = f"critical difference {panel.difference:.2f}"
    if ruled > last:
        axes.text(first, RULER, f"{text}, longer than the axis", ha="left", va="bottom", fontsize=8,
                  color=GREY)  # fmt: skip
        return
    axes.plot([first, ruled], [RULER] * 2, color=GREY, lw=1.2, marker="|", ms=5)
    axes.text(first, RULER - 0.3, text, ha="left", va="bottom", fontsize=8, color=GREY)


def _ticks(count: int) -> list[int]:
    """Whole ranks from 1 to the last one, at most `MOST_TICKS`."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if count / s <= MOST_TICKS)
    return [1, *(tick for tick in range(step, count + 1, step) if tick > 1)]


def _first_name(panel: CriticalDifference) -> float:
    """The top of the first row of names, below the bars of the groups."""
    return FIRST_GROUP + len(panel.groups) * GROUP_STEP + 0.2
