"""Chooses the height of a panel and the function that draws it, for every kind of panel."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fedprompt.reports.draw_bars import draw_bars
from fedprompt.reports.draw_cells import draw_boxes, draw_heat
from fedprompt.reports.draw_lines import draw_lines, legend_columns, visible
from fedprompt.reports.draw_ranks import draw_ranks, ranks_height
from fedprompt.reports.draw_style import NAMED
from fedprompt.reports.figure import Bars, Boxes, Heat, Lines, Panel
from fedprompt.reports.figure_ranks import CriticalDifference

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW_IN = 0.165
"""Height of a row with a name, in inches."""
LEGEND_LINE_IN = 0.2


def panel_height(panel: Panel) -> float:
    """Return the height of a panel in inches, including its legend."""
    if isinstance(panel, Lines):
        named = 0 if panel.named_at_ends else len(visible(panel)) + len(panel.levels)
        return (1.1 if panel.small else 2.9) + LEGEND_LINE_IN * math.ceil(
            named / legend_columns(panel)
        )
    if isinstance(panel, Bars):
        names = len(panel.series) + len(panel.levels) + (panel.marks is not None)
        legend = LEGEND_LINE_IN * math.ceil(names / 3) if names > 1 else 0.0
        return (1.1 if panel.small else 2.7) + legend
    if isinstance(panel, Boxes):
        return 0.34 * len(panel.groups) + 0.7
    if isinstance(panel, CriticalDifference):
        return ranks_height(panel)
    # Only heat maps are left. Below 20 rows the cells get taller, beyond `NAMED` thinner.
    rows = len(panel.rows)
    if panel.square:
        return 4.9
    return max(1.2, 0.4 * rows if rows <= 8 else ROW_IN * min(max(rows, 20), NAMED)) + 0.9


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw a panel of any kind."""
    if isinstance(panel, Lines):
        draw_lines(axes, panel)
    elif isinstance(panel, Bars):
        draw_bars(axes, panel)
    elif isinstance(panel, Heat):
        draw_heat(axes, panel)
    elif isinstance(panel, CriticalDifference):
        draw_ranks(axes, panel)
    else:
        draw_boxes(axes, panel)
