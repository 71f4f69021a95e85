"""Pictures show the numbers of the figures that they are drawn from."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure as Picture
from matplotlib.patches import Rectangle
from PIL import Image

from fedprompt.data.partition import sparse
from fedprompt.reports.draw import draw, save
from fedprompt.reports.draw_lines import spread_labels
from fedprompt.reports.figure import (
    ACCURACY,
    Axis,
    Bars,
    BarSeries,
    Boxes,
    Curve,
    Figure,
    Heat,
    Level,
    Lines,
    Marks,
    Panel,
)
from fedprompt.reports.figure_parts import box, model_bars
from fedprompt.reports.figure_ranks import CriticalDifference
from fedprompt.reports.partition_figure import partition_figure, plot_partition
from fedprompt.reports.run_data import load_run
from fedprompt.reports.run_figures import run_figures
from fedprompt.reports.run_report import draw_all
from tests.support.fake_runs import write_run


def picture(*panels: Panel) -> Picture:
    """A drawn figure of these panels."""
    drawn = draw(Figure(name="x", title="Title", caption="A caption.", panels=panels))
    drawn.draw_without_rendering()
    return drawn


def heights(drawn: Picture, panel: int = 0) -> list[float]:
    patches = drawn.axes[panel].patches
    return [patch.get_height() for patch in patches if isinstance(patch, Rectangle)]


def test_curves_bands_and_levels() -> None:
    curve = Curve(name="a", color="own", x=[0, 1], y=[0.5, 0.9], spread=[0.2, 0.2])
    axis = Axis(label="Round", format="count")
    panel = Lines(curves=[curve], levels=[Level("b", "server", 0.4)], x=axis, y=ACCURACY)
    axes = picture(panel).axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.5, 0.9], [0.4, 0.4]]
    (band,) = axes.collections
    corners = {(float(x), round(float(y), 6)) for x, y in band.get_paths()[0].vertices}
    assert corners == {(0, 0.3), (0, 0.7), (1, 0.7), (1, 1.0)}, "one deviation, within 0 and 1"


def test_curves_are_named_at_their_ends_or_in_a_legend() -> None:
    lines = [Curve(name=name, color="own", x=[0, 1], y=[0, y]) for name, y in (("a", 1), ("b", 2))]
    axis = Axis()
    beside = picture(Lines(curves=lines, x=axis, y=axis, named_at_ends=True)).axes[0]
    assert [text.get_text() for text in beside.texts] == ["a 1", "b 2"]
    assert beside.get_legend() is None
    legend = picture(Lines(curves=lines, x=axis, y=axis)).axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]


def test_curves_that_are_off_are_not_drawn() -> None:
    lines = [
        Curve(name=name, color="own", x=[0, 1], y=[0, 1], on=on)
        for name, on in (("a", True), ("b", False))
    ]
    axes = picture(Lines(curves=lines, x=Axis(), y=Axis())).axes[0]
    assert [line.get_label() for line in axes.lines] == ["a"]


@pytest.mark.parametrize("log", [False, True])
def test_bytes_have_binary_units(log: bool) -> None:
    curve = Curve(name="a", color="own", x=[2**15, 2**21], y=[0, 1])
    axis = Axis(format="bytes", log=log)
    labels = picture(Lines(curves=[curve], x=axis, y=ACCURACY)).axes[0].get_xticklabels()
    texts = [label.get_text() for label in labels]
    assert "1 MiB" in texts
    assert all(text.endswith(("B", "KiB", "MiB")) for text in texts)


def test_categories_name_a_curves_positions() -> None:
    curve = Curve(name="a", color="own", x=[0, 1], y=[0, 1])
    axes = picture(Lines(curves=[curve], x=Axis(names=["one", "many"]), y=ACCURACY)).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["one", "many"]


def test_bars_beside_each_other_have_their_values() -> None:
    figure = model_bars(
        "x", "t", "", ["base", "new"], {"global": [0.5, None], "personal": [0.25, 0.75]},
        {"global": [0.1, None]},
    )  # fmt: skip
    axes = draw(figure).axes[0]
    assert [patch.get_height() for patch in axes.patches] == [0.5, 0.25, 0.75]
    assert [text.get_text() for text in axes.texts] == ["50.0", "25.0", "75.0"]
    assert len(axes.containers) == 3, "two series of bars and one error bar"


def test_stacked_bars_marks_and_crosses() -> None:
    stacked = Bars(
        labels=["0", "1"], stacked=True, x=Axis(), y=Axis(format="count"),
        series=[BarSeries("a", "c0", [5, 2]), BarSeries("b", "c1", [0, 6])],
    )  # fmt: skip
    clients = Bars(
        labels=["0", "1"], x=Axis(), y=ACCURACY, missing="not tested",
        series=[BarSeries("a", "own", [0.5, None])], marks=Marks("b", [0.4, None]),
    )  # fmt: skip
    drawn = picture(stacked, clients)
    assert heights(drawn) == [5, 2, 0, 6]
    assert [patch.get_y() for patch in drawn.axes[0].patches] == [0, 0, 5, 2]
    by_name = {str(line.get_label()): line for line in drawn.axes[1].lines}
    assert list(by_name["Not tested"].get_xdata()) == [1]
    assert list(by_name["b"].get_ydata()) == [0.4]


def test_heat_maps_hold_their_cells() -> None:
    panel = Heat(
        rows=["a", "b"], columns=["0", "1"], cells=[[5, None], [1, 40]], name="images",
        format="count", x=Axis(), y=Axis(), low=0, root=True,
    )  # fmt: skip
    axes = picture(panel).axes[0]
    assert np.ma.filled(axes.images[0].get_array(), 0).tolist() == [[5, 0], [1, 40]]
    assert [text.get_text() for text in axes.texts] == ["5", "1", "40"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b"]


def test_a_heat_map_of_equal_or_no_cells_is_drawn() -> None:
    for cells in ([[0.5, 0.5]], [[None, None]]):
        panel = Heat(
            rows=["a"], columns=["0", "1"], cells=cells, name="x", format="percent", x=Axis(),
            y=Axis(),
        )  # fmt: skip
        assert picture(panel).axes[0].images


def test_boxes_reach_from_quartile_to_quartile() -> None:
    values = [0.0, 0.1, 0.2, 0.3, 1.0]
    axes = picture(Boxes(groups=[box("a", "own", values)], x=ACCURACY)).axes[0]
    ends = np.asarray(axes.patches[0].get_path().vertices)[:, 0]
    assert (ends.min(), ends.max()) == pytest.approx((0.1, 0.3))


def test_a_critical_difference_diagram_by_hand() -> None:
    panel = CriticalDifference(["a", "b", "c"], [1.0, 1.5, 3.0], 1.0, [(0, 1)])
    lines = picture(panel).axes[0].lines
    ends = [[float(x) for x in line.get_xdata()] for line in lines]
    heights = [[float(y) for y in line.get_ydata()] for line in lines]
    # The axis, from 1 to 3.
    left, right = ends[0]
    middle = (left + right) / 2
    assert ends[1] == pytest.approx([left, middle]), "the critical difference is 1 of 2"
    assert ends[-1] == pytest.approx([left - 0.006, (left + middle) / 2 + 0.006]), "the bar"
    names = [(x, y) for x, y in zip(ends, heights, strict=True) if len(x) == 3]
    starts = [x[0] for x, _ in names]
    assert starts == pytest.approx([left, (left + middle) / 2, right])
    sides = [left, left, right]
    assert [x[-1] for x, _ in names] == pytest.approx(sides), "two names are left, one is right"


@pytest.mark.parametrize("names", [["a" * 30] * 60, [f"method_{i}" for i in range(38)]])
def test_names_of_a_critical_difference_diagram_do_not_overlap(names: list[str]) -> None:
    count = len(names)
    # All of equal rank: the hardest case.
    panel = CriticalDifference(names, [(count + 1) / 2] * count, count * 2.0, [(0, count - 1)])
    drawn = picture(panel)
    areas = [text.get_window_extent() for text in drawn.axes[0].texts]
    assert len(areas) > count
    overlaps = [(a, b) for i, a in enumerate(areas) for b in areas[i + 1 :] if a.overlaps(b)]
    assert overlaps == []
    assert all(area.x0 >= 0 and area.x1 <= drawn.bbox.width for area in areas)


@pytest.mark.parametrize(
    ("clients", "classes", "named"), [(10, 20, 20), (100, 45, 45), (10, 345, 44)]
)
def test_a_partition_names_as_many_classes_as_fit_a_line_each(
    clients: int, classes: int, named: int
) -> None:
    names = [f"class {c}" for c in range(classes)]
    counts = sparse(np.ones((clients, classes), dtype=np.int64))
    drawn = draw(partition_figure({"class_names": names, "train_counts": counts}))
    drawn.draw_without_rendering()
    labels = drawn.axes[1].get_yticklabels()
    assert len(labels) == named
    spans = sorted((area.y0, area.y1) for area in (x.get_window_extent() for x in labels))
    overlap = [low[1] - high[0] for low, high in pairwise(spans)]
    assert max(overlap) <= 1.0, "pixels by which neighbouring names overlap"


def test_text_is_drawn_literally(tmp_path: Path) -> None:
    names = ["$\\frac{$", "a_b^c", "<script>", "x" * 60]
    path = tmp_path / "new folder" / "partition.png"
    plot_partition({"class_names": names, "train_counts": [[0, 1, 1, 2, 2, 3, 3, 4]]}, path)
    with Image.open(path) as image:
        assert image.width == 840
    evil = "$\\frac{$"
    curve = Curve(name=evil, color="own", x=[0], y=[1])
    axis = Axis(label=evil, names=[evil])
    for at_ends in (True, False):
        panel = Lines(curves=[curve], x=axis, y=Axis(label=evil), named_at_ends=at_ends)
        bars = Bars(labels=[evil], series=[BarSeries(evil, "own", [1])] * 2, x=axis, y=Axis())
        groups = Boxes(groups=[box(evil, "own", [1.0])], x=Axis(label=evil))
        figure = Figure(name="x", title=evil, caption=evil, panels=[panel, bars, groups])
        save(figure, tmp_path / "x.png")


def test_a_runs_files_have_150_dpi_and_depend_on_the_run_only(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    plots = folder / "plots"
    paths = draw_all(run_figures(load_run(folder)), plots)
    names = ["accuracy_per_round", "client_accuracy", "loss_per_round", "partition"]
    assert paths == [plots / f"{name}.png" for name in names]
    for path in paths:
        with Image.open(path) as image:
            assert image.width == 840
            assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
            assert "Software" not in image.info
    first = [path.read_bytes() for path in paths]
    assert [p.read_bytes() for p in draw_all(run_figures(load_run(folder)), plots)] == first


def test_figures_of_an_earlier_state_go_and_files_of_the_user_stay(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run"))
    ours = draw_all(run_figures(run), tmp_path / "plots")
    mine = tmp_path / "plots" / "protocol_mine.png"
    mine.write_bytes(b"of somebody else")
    assert draw_all([], tmp_path / "plots") == []
    assert len(ours) == 4
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["protocol_mine.png"]


def test_labels_keep_their_order_and_their_distance() -> None:
    assert spread_labels([0.2, 0.8], gap=0.1) == [0.2, 0.8]
    assert spread_labels([0.5, 0.5, 0.1], gap=0.1) == pytest.approx([0.5, 0.6, 0.1])
    assert spread_labels([1.0, 0.99, 0.98], gap=0.1) == pytest.approx([1.0, 0.9, 0.8])
    assert spread_labels([], gap=0.1) == []
