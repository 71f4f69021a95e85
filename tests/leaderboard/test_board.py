"""Scores, ranks, significance and costs of small boards, against numbers computed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedprompt.leaderboard.board import Board, make_board
from fedprompt.leaderboard.collect import Entry, Suite
from fedprompt.leaderboard.figures import board_figures, pareto_front
from fedprompt.reports.figure_ranks import CriticalDifference
from fedprompt.suites.result_file import ResultFile, SeedResult
from tests.leaderboard.test_ranks import DEMSAR
from tests.support.result_files import result_file


def suite(*results: ResultFile) -> Suite:
    """A suite of these rows."""
    metrics = {name: s.metric for r in results for name, s in r.scenarios.items()}
    entries = tuple(Entry(Path(f"{r.row}.json"), r) for r in results)
    first = results[0]
    return Suite(first.suite, first.suite_hash, first.planned, metrics, entries)


def default(*results: ResultFile, **options: object) -> Board:
    """The board of these rows at default settings."""
    board = make_board(suite(*results), "default", **options)  # type: ignore[arg-type]
    assert board is not None
    return board


def with_runs(result: ResultFile, **changes: object) -> ResultFile:
    """The result with changes in all runs with default settings."""

    def changed(run: SeedResult) -> SeedResult:
        return replace(run, **changes)  # type: ignore[arg-type]

    scenarios = {}
    for name, scenario in result.scenarios.items():
        assert scenario.default is not None
        seeds = {seed: changed(run) for seed, run in scenario.default.seeds.items()}
        scenarios[name] = replace(scenario, default=replace(scenario.default, seeds=seeds))
    return replace(result, scenarios=scenarios)


A = result_file("A", {"x": {1: 0.5, 2: 0.7}, "y": {1: 0.8, 2: 0.8}})
B = result_file("B", {"x": {1: 0.6, 2: 0.4}, "y": {1: 0.9, 2: 1.0}})
C = result_file("C", {"x": {1: 0.1, 2: 0.2}, "y": {1: 0.3, 2: 0.3}})


def test_scores_and_spreads_by_hand() -> None:
    board = default(A, B, C)
    assert [line.row for line in board.lines] == ["B", "A", "C"]
    b, a, _ = board.lines
    assert a.cells["x"].mean == pytest.approx(0.6)
    assert a.cells["x"].std == pytest.approx(0.02**0.5), "n - 1: (0.1^2 + 0.1^2) / 1"
    assert a.score.mean == pytest.approx((0.6 + 0.8) / 2)
    # By seed: (0.5 + 0.8) / 2 = 0.65 and 0.75.
    assert a.score.std == pytest.approx(0.005**0.5)
    assert b.score.mean == pytest.approx((0.5 + 0.95) / 2)
    assert [line.score.best for line in board.lines] == [True, False, False]
    assert (a.cells["x"].best, b.cells["y"].best) == (True, True)


def test_ranks_over_scenarios_and_over_runs() -> None:
    board = default(A, B, C)
    # x: A 0.6, B 0.5, C; y: B 0.95, A 0.8, C.
    assert [line.rank for line in board.lines] == [1.5, 1.5, 3]
    assert board.ranks.blocks == 2
    board = default(A, B, C, kind="runs")
    # x1: B A C; x2: A B C; y1: B A C; y2: B A C.
    assert {line.row: line.rank for line in board.lines} == {"B": 1.25, "A": 1.75, "C": 3}
    assert board.ranks.blocks == 4


@pytest.mark.parametrize(
    ("by", "order"), [("score", "BAC"), ("x", "ABC"), ("y", "BAC"), ("rank", "ABC")]
)
def test_order(by: str, order: str) -> None:
    assert "".join(line.row for line in default(A, B, C, by=by).lines) == order


def test_groups_name_the_rows_in_the_order_of_the_board() -> None:
    rows = {"last": 0.1, "first": 0.9, "middle": 0.5}
    scenarios = [f"s{i}" for i in range(12)]
    board = default(
        *(result_file(n, {s: {1: v + i / 1000} for i, s in enumerate(scenarios)})
          for n, v in rows.items())
    )  # fmt: skip
    assert [line.row for line in board.lines] == ["first", "middle", "last"]
    # Ranks 1, 2, 3 in 12 blocks; the critical difference is 2.343 * sqrt(12 / 72) = 0.957.
    assert board.ranks.averages == (1, 2, 3)
    assert board.ranks.critical_difference == pytest.approx(0.957, abs=1e-3)
    assert board.ranks.groups == ()


def test_demsars_example_as_a_suite() -> None:
    names = ("C4.5", "m", "cf", "both")
    rows = [
        result_file(name, {f"data-{i}": {1: value} for i, value in enumerate(values)})
        for name, values in zip(names, DEMSAR.tolist(), strict=True)
    ]
    board = default(*rows)
    ranks = {line.row: round(line.rank, 3) for line in board.lines}
    assert ranks == {"C4.5": 3.143, "m": 2.0, "cf": 2.893, "both": 1.964}
    # Signed-rank tests against "both" by posthoc_wilcoxon of scikit-posthocs 0.17.1: 0.015874,
    # 0.327826 and 0.030175. Holm multiplies the smallest by 3, the next one by 2.
    p = {line.row: line.score.p for line in board.lines}
    assert p["both"] is None
    assert p["C4.5"] == pytest.approx(3 * 0.015874, abs=1e-5)
    assert p["cf"] == pytest.approx(2 * 0.030175, abs=1e-5)
    assert p["m"] == pytest.approx(0.327826, abs=1e-5)
    (figure,) = [f for f in board_figures([board]) if f.name.startswith("ranks")]
    (panel,) = figure.panels
    assert isinstance(panel, CriticalDifference)
    assert panel.names == ["both", "m", "cf", "C4.5"]
    assert panel.groups == [(0, 3)]


def test_few_blocks_have_no_wilcoxon_test() -> None:
    assert [line.score.p for line in default(A, B, C).lines] == [None] * 3


@pytest.mark.parametrize(
    ("default_values", "missing"),
    [
        ({"x": {1: 0.5}, "y": {1: 0.5, 2: 0.5}}, "x (seed 2)"),
        ({"x": {1: 0.5, 2: 0.5}}, "y"),
        ({"x": {}, "y": {1: 0.5}}, "x, y (seed 2)"),
    ],
)
def test_an_incomplete_row_is_listed_and_not_ranked(
    default_values: dict[str, dict[int, float]], missing: str
) -> None:
    planned = {"x": [1, 2], "y": [1, 2]}
    part = result_file("part", default_values, planned=planned)
    board = default(A, part, B)
    assert [line.row for line in board.lines] == ["B", "A"]
    assert [(one.row, one.missing) for one in board.incomplete] == [("part", missing)]
    assert board.ranks == default(A, B).ranks


def test_another_metric_that_was_not_measured_leaves_a_row_out() -> None:
    board = default(with_runs(A, global_=None), B, metric="global")
    assert [line.row for line in board.lines] == ["B"]
    assert board.lines[0].score.mean == pytest.approx((0.5 + 0.95) / 2 / 2)
    assert [one.missing for one in board.incomplete] == ["x, y"]


def test_scenarios_with_different_seeds_have_a_score_without_spread() -> None:
    rows = [result_file(name, {"x": {1: 0.5, 2: 0.7}, "y": {3: 0.9}}) for name in "AB"]
    line = default(*rows).lines[0]
    assert line.score.mean == pytest.approx((0.6 + 0.9) / 2)
    assert line.score.std is None


def test_a_setting_that_nobody_ran_has_no_board() -> None:
    assert make_board(suite(A, B), "tuned") is None


def test_costs_are_means_and_memory_is_the_largest() -> None:
    scenario = A.scenarios["x"]
    assert scenario.default is not None
    seeds = dict(scenario.default.seeds)
    seeds[1] = replace(seeds[1], bytes_up=4048, seconds=5.5, peak_memory_bytes=3 * 10**9)
    changed = replace(scenario, default=replace(scenario.default, seeds=seeds))
    cost = default(replace(A, scenarios={**A.scenarios, "x": changed})).lines[0].cost
    assert (cost.bytes_up, cost.bytes_down, cost.traffic) == (2548, 4096, 6644)
    assert (cost.client_steps, cost.seconds, cost.peak_memory) == (100, 2.5, 3 * 10**9)


def test_the_pareto_front_by_hand() -> None:
    points = {"a": (0.5, 0), "b": (0.7, 10), "c": (0.6, 20), "d": (0.7, 30), "e": (0.8, 40)}
    rows = [
        with_runs(result_file(name, {"x": {1: value}}), bytes_up=0, bytes_down=traffic)
        for name, (value, traffic) in points.items()
    ]
    board = default(*rows)
    assert [line.row for line in pareto_front(board.lines)] == ["a", "b", "e"]
    traffic = board_figures([board])[-1]
    dots, front = traffic.panels[0].curves  # type: ignore[union-attr]
    assert (list(dots.notes), list(front.notes)) == (["b", "c", "d", "e"], ["b", "e"])
    (level,) = traffic.panels[0].levels  # type: ignore[union-attr]
    assert "a" in level.name
    assert level.value == 0.5, "zero bytes are on no logarithmic axis"
