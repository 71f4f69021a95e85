"""Renders figures as PNG files: the matplotlib side of what `figure.py` describes.

Matplotlib is imported when the first figure is drawn, so that commands that draw nothing do not
wait for it. pyplot is not used: it keeps global state, and may look for a display.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from fedprompt.files import MARKED_BYTES, replacing
from fedprompt.reports.draw_panels import draw_panel, panel_height
from fedprompt.reports.draw_style import GREY, INK
from fedprompt.reports.figure import Figure
from fedprompt.reports.fonts import fonts_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

SOURCE = "fedprompt"
"""The tag `Source` of our PNG files, by which they are told from those of the user."""
MARK = b"Source\0" + SOURCE.encode()
"""That tag as it is stored in a PNG file, before the pixels."""
WIDTH_IN, DPI = 5.6, 150
"""Width of every picture in inches, and pixels per inch."""
TITLE_LETTERS, CAPTION_LETTERS = 58, 84
"""Characters that fit in one line of the title and of the caption."""
TITLE_LINE_IN, CAPTION_LINE_IN = 0.25, 0.15


def draw(figure: Figure) -> Picture:
    """Render a figure with matplotlib: the title, the panels from top to bottom, the caption."""
    with fonts_for(figure):
        return _drawn(figure)


def _drawn(figure: Figure) -> Picture:
    from matplotlib.figure import Figure as Picture

    title = wrap(figure.title, TITLE_LETTERS)
    caption = wrap(figure.caption, CAPTION_LETTERS)
    heights = [panel_height(panel) for panel in figure.panels]
    frame = TITLE_LINE_IN * len(title) + CAPTION_LINE_IN * len(caption) + 0.15
    picture = Picture(figsize=(WIDTH_IN, sum(heights) + frame), dpi=DPI, layout="constrained")
    # parse_math=False here and everywhere: a `$` in the name of a run or class is not mathematics.
    picture.suptitle(
        "\n".join(title), x=0.02, ha="left", fontsize=12.5, fontweight="bold", color=INK,
        parse_math=False,
    )  # fmt: skip
    panels = picture.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(panels, figure.panels, strict=True):
        draw_panel(axes, panel)
    if caption:
        picture.supxlabel(
            "\n".join(caption), x=0.02, ha="left", fontsize=8.5, color=GREY, parse_math=False
        )
    return picture


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file. The same figure always gives the same bytes.

    Args:
        figure: The figure.
        path: The file, which is replaced.

    Raises:
        OSError: The file cannot be written.
    """
    # Without the tag that names matplotlib's version, the file depends on the figure only.
    metadata = {"Software": None, "Source": SOURCE}
    with replacing(path) as temporary, fonts_for(figure):
        # The format is named, because the temporary file does not end in `.png`.
        draw(figure).savefig(temporary, format="png", dpi=DPI, facecolor="white", metadata=metadata)


def save_all(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Write figures as PNG files, named after the figures.

    Args:
        figures: The figures.
        folder: The folder, which is created if necessary.

    Returns:
        The paths of the files, in the order of the figures.

    Raises:
        OSError: A file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{figure.name}.png" for figure in figures]
    for figure, path in zip(figures, paths, strict=True):
        save(figure, path)
    return paths


def is_ours(path: Path) -> bool:
    """Whether a PNG file was written by `save`, as far as its tags tell."""
    try:
        with path.open("rb") as stream:
            return MARK in stream.read(MARKED_BYTES)
    except OSError:
        return False
