"""The descriptions of a run's figures hold the run's numbers, and only those."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from fedprompt.data.partition import dense, sparse
from fedprompt.experiment.summary import few_test_images
from fedprompt.files import asset
from fedprompt.reports.client_figure import MANY, clients_figure
from fedprompt.reports.figure import COLOURS, PALETTE, Bars, Curve, Figure, Heat, Lines, palette
from fedprompt.reports.figure_parts import MOST_BARS, box, count_bars, stairs
from fedprompt.reports.partition_figure import partition_figure
from fedprompt.reports.run_data import accuracy_of, load_run
from fedprompt.reports.run_figures import accuracy_figure, loss_figure, run_figures
from fedprompt.reports.run_report import client_rows
from tests.support.fake_runs import rewrite, write_run


def curves(figure: Figure | None) -> dict[str, Curve]:
    """The curves of a figure's first panel, by name."""
    assert figure is not None
    panel = figure.panels[0]
    assert isinstance(panel, Lines)
    return {curve.name: curve for curve in panel.curves}


def levels(figure: Figure | None) -> dict[str, float]:
    """The reference lines of a figure's first panel, by name."""
    assert figure is not None
    panel = figure.panels[0]
    assert isinstance(panel, Lines | Bars)
    return {level.name: level.value for level in panel.levels}


def bars(figure: Figure | None, panel: int = 0) -> dict[str, list[float | None]]:
    """The bars of a panel, by the name of their series."""
    assert figure is not None
    described = figure.panels[panel]
    assert isinstance(described, Bars)
    return {series.name: list(series.values) for series in described.series}


def test_accuracy_figure_holds_every_measured_number(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", rounds=2))
    figure = accuracy_figure(run)
    for name, part, key in (
        ("Global", "global", "accuracy"),
        ("Personalised", "personal", "mean"),
        ("Worst client", "personal", "worst"),
    ):
        curve = curves(figure)[name]
        assert list(curve.x) == [0, 1, 2]
        assert list(curve.y) == [line[part][key] for line in run.rounds]
    assert curves(figure)["Personalised"].spread == [line["personal"]["std"] for line in run.rounds]
    alone = curves(figure)["Local-only"]
    assert list(alone.y) == [line["personal"]["mean"] for line in run.local_only]
    assert run.summary is not None
    zero_shot = run.summary["zero_shot"]
    assert levels(figure) == {
        "Zero-shot": zero_shot["accuracy"],
        "Zero-shot, own tests": zero_shot["personal"]["mean"],
    }


def test_rounds_that_were_not_evaluated_are_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=4)
    odd = {"global": None, "personal": None}
    rewrite(folder / "metrics.jsonl", lambda x: x | odd if x["round"] % 2 else x)
    run = load_run(folder)
    assert list(curves(accuracy_figure(run))["Global"].x) == [0, 2, 4]
    assert list(curves(loss_figure(run))["Training"].x) == [1, 2, 3, 4]
    assert run.last("global") == run.rounds[4]["global"]


def test_loss_figure_holds_the_losses_and_skips_what_is_not_finite(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=3)
    broken = {"train": {"loss": float("nan"), "loss-ce": float("nan")}}
    rewrite(
        folder / "metrics.jsonl",
        lambda x: x | broken if (x["kind"], x["round"]) == ("round", 2) else x,
    )
    run = load_run(folder)
    drawn = curves(loss_figure(run))
    assert list(drawn["Training"].x) == [1, 3]
    assert list(drawn["Training"].y) == [run.rounds[r]["train"]["loss-ce"] for r in (1, 3)]
    assert list(drawn["Global test"].y) == [line["global"]["loss"] for line in run.rounds]
    alone = drawn["Local-only training"]
    assert list(alone.x) == [1, 2, 3]
    assert list(alone.y) == [line["train"]["loss"] for line in run.local_only[1:]]


def test_losses_on_one_axis_are_the_same_loss(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", rounds=3))
    figure = loss_figure(run)
    assert figure is not None
    crosses, whole = figure.panels
    assert isinstance(crosses, Lines)
    assert isinstance(whole, Lines)
    # The test's loss is a cross-entropy, and so is local-only training's; FedRSCLIP's has terms
    # that neither has.
    assert [curve.name for curve in crosses.curves] == [
        "Training", "Global test", "Local-only training",
    ]  # fmt: skip
    assert "entropy" in crosses.y.label
    assert list(whole.curves[0].y) == [line["train"]["loss"] for line in run.rounds[1:]]
    assert (crosses.x.low, crosses.x.high) == (whole.x.low, whole.x.high) == (0, 3)
    plain = write_run(tmp_path / "plain")
    only = {"loss": 1.0, "loss-ce": 1.0}
    rewrite(plain / "metrics.jsonl", lambda x: x | {"train": only if x["round"] else None})
    figure = loss_figure(load_run(plain))
    assert figure is not None
    assert len(figure.panels) == 1
    unnamed = write_run(tmp_path / "unnamed")
    rewrite(unnamed / "metrics.jsonl", lambda x: x | {"train": {"loss": 1.0}})
    figure = loss_figure(load_run(unnamed))
    assert figure is not None
    assert "Training" not in curves(figure)


def test_a_round_that_tests_everyone_is_no_point_of_the_participants_curve(
    tmp_path: Path,
) -> None:
    folder = write_run(tmp_path / "run", rounds=3)
    config = OmegaConf.load(folder / "config.yaml")
    config.evaluation = {"clients": "participants"}
    OmegaConf.save(config, folder / "config.yaml")
    rewrite(folder / "metrics.jsonl", lambda x: x if x["round"] else x | {"personal": None})
    run = load_run(folder)
    drawn = curves(accuracy_figure(run))
    means = [(line["personal"] or {}).get("mean") for line in run.rounds]
    participants, everyone = drawn["Personalised, participants"], drawn["Personalised, all"]
    assert (list(participants.x), list(participants.y)) == ([1, 2], means[1:3])
    assert (list(everyone.x), list(everyone.y)) == ([3], means[3:])
    assert list(drawn["Local-only, all"].x) == [3]
    assert list(drawn["Global"].x) == [0, 1, 2, 3]
    assert "Personalised" not in drawn


def test_a_method_without_a_global_model_has_no_global_curve(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    rewrite(folder / "metrics.jsonl", lambda x: x | {"global": None})
    figure = accuracy_figure(load_run(folder))
    assert "Global" not in curves(figure)
    assert "Personalised" in curves(figure)
    assert set(levels(figure)) == {"Zero-shot, own tests"}


def test_a_run_of_zero_rounds_has_points_and_a_bare_run_has_no_figure(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "zero", rounds=0))
    assert list(curves(accuracy_figure(run))["Global"].y) == [0.41]
    bare = write_run(tmp_path / "bare", finished=False)
    rewrite(bare / "metrics.jsonl", lambda x: {"kind": x["kind"], "round": x["round"]})
    (bare / "partition.json").unlink()
    (bare / "timings.jsonl").unlink()
    assert run_figures(load_run(bare)) == []


def test_client_figure_has_each_client_and_marks_the_untested(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", clients=4, untested=(2,)))
    figure = clients_figure(run)
    assert figure is not None
    assert run.partition is not None
    last = run.rounds[-1]["personal"]
    assert last["clients"] == [0, 1, 3]
    first, second, fourth = last["accuracy"]
    assert bars(figure)["Personalised"] == [first, second, None, fourth]
    alone = accuracy_of(run.local_only[-1]["personal"])
    assert bars(figure)["Local-only"] == [alone[0], alone[1], None, alone[3]]
    test_K = dense(run.partition["test_counts"], 4).sum(axis=1).tolist()
    assert bars(figure, 1)["test images"] == test_K
    panel = figure.panels[0]
    assert isinstance(panel, Bars)
    assert panel.missing
    assert panel.marks is not None
    assert [value is None for value in panel.marks.values] == [False, False, True, False]
    assert dict(panel.notes[0])["test images"] == f"{test_K[0]:,}"
    ((name, mean),) = levels(figure).items()
    assert mean == last["mean"]
    assert f"{100 * last['mean']:.1f} ± {100 * last['std']:.1f} %" in name


def test_clients_with_few_test_images_are_marked(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", clients=3, classes=2)
    path = folder / "partition.json"
    partition = json.loads(path.read_text()) | {
        "test_counts": sparse(np.array([[4, 0], [3, 2], [9, 9]]))
    }
    path.write_text(json.dumps(partition))
    run = load_run(folder)
    figure = clients_figure(run)
    assert figure is not None
    panel = figure.panels[0]
    assert isinstance(panel, Bars)
    assert list(panel.labels) == ["0*", "1", "2"]
    assert "fewer than 5 test images" in figure.caption
    assert [row.few for row in client_rows(run, run.summary or {})] == [True, False, False]
    described = {**partition, "class_names": ["a", "b"]}
    assert few_test_images(described) == {"below": 5, "clients": [0]}


def test_many_clients_are_described_by_distributions(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", clients=MANY + 100, untested=(7,)))
    assert run.partition is not None
    accuracy = accuracy_of(run.rounds[-1]["personal"])
    assert 7 not in accuracy
    figure = clients_figure(run)
    expected = np.histogram(list(accuracy.values()), np.linspace(0, 1, 21))[0].tolist()
    assert bars(figure)["Clients, personalised"] == expected
    assert sum(value or 0 for value in bars(figure, 1)["clients"]) == MANY + 100
    partition = partition_figure(run.partition)
    for panel in (0, 1):
        assert sum(value or 0 for value in bars(partition, panel)["clients"]) == MANY + 100
    train_KC = dense(run.partition["train_counts"], 4)
    assert bars(partition, 2)["clients that hold it"] == (train_KC > 0).sum(axis=0).tolist()
    holders = partition.panels[2]
    assert isinstance(holders, Bars)
    assert list(holders.labels) == run.partition["class_names"]


def test_partition_figure_holds_every_count() -> None:
    rows = sparse(np.array([[5, 0, 1], [0, 40, 0]]))
    figure = partition_figure({"class_names": ["a", "b", "c"], "train_counts": rows})
    heat = figure.panels[1]
    assert isinstance(heat, Heat)
    assert heat.cells == [[5, None], [None, 40], [1, None]]
    assert (list(heat.rows), list(heat.columns)) == (["a", "b", "c"], ["0", "1"])
    assert bars(figure)["training images"] == [6, 40]


def test_partition_totals_are_stacked_by_domain_only_when_the_counts_agree() -> None:
    description: dict[str, Any] = {
        "class_names": ["a", "b"],
        "domain_names": ["city", "coast"],
        "train_counts": [[0, 3, 1, 1], [1, 6]],
        "test_counts": [[0, 1], [1, 2]],
    }
    stacked = partition_figure(description | {"domain_counts": [[0, 5], [0, 2, 1, 6]]})
    assert bars(stacked) == {"city": [5, 2], "coast": [0, 6]}
    plain = partition_figure(description | {"domain_counts": [[0, 9], [0, 2, 1, 4]]})
    assert bars(plain) == {"training images": [4, 6]}


def test_clients_without_labels_are_told_apart() -> None:
    description = {"class_names": ["a", "b"], "train_counts": [[0, 3], [1, 6], [0, 2]]}
    figure = partition_figure(description | {"unlabelled_clients": [1]})
    assert bars(figure) == {
        "training images": [3, 0, 2],
        "training images without labels": [0, 6, 0],
    }
    assert "Without labels: 1." in figure.caption
    assert "abels" not in partition_figure(description).caption


def test_whole_numbers_have_a_bar_each_or_share_one() -> None:
    few = count_bars("Images", [3, 5, 5])
    assert (list(few.labels), few.series[0].values) == (["3", "4", "5"], [1, 0, 2])
    many = count_bars("Images", range(10 * MOST_BARS))
    assert len(many.labels) <= MOST_BARS + 1
    assert many.labels[0] == "0-9"
    assert sum(value or 0 for value in many.series[0].values) == 10 * MOST_BARS


def test_boxes_and_stairs() -> None:
    group = box("a", "own", [0.0, 0.1, 0.2, 0.3, 1.0])
    assert (group.low, group.q1, group.median, group.q3, group.high) == pytest.approx(
        (0, 0.1, 0.2, 0.3, 1)
    )
    assert stairs([0.0, 0.5, 1.0], [3, 4]) == ([0.0, 0.5, 0.5, 1.0], [3, 3, 4, 4])


def test_a_figure_becomes_json_values(tmp_path: Path) -> None:
    for figure in run_figures(load_run(write_run(tmp_path / "run"))):
        for panel, spec in zip(figure.panels, figure.spec(), strict=True):
            assert spec["kind"] == panel.kind
            assert "kind" not in vars(panel)


def test_the_page_knows_every_colour() -> None:
    style = asset("reports/assets/report.css").read_text(encoding="utf-8")
    light = style.partition(":root[data-theme")[0]
    for name, colour in COLOURS.items():
        assert re.search(rf"--{name}: {colour};", light), name
        assert style.count(f"--{name}:") == 3, "light, dark, and dark by the reader's preference"
    assert {palette(i) for i in range(2 * PALETTE)} <= set(COLOURS)
