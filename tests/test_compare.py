"""Comparisons: tables against an independent recomputation from metrics.jsonl, tests, figures."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from scipy import stats
from typer.testing import CliRunner

from fedprompt.cli import app
from fedprompt.compare.figures import (
    client_accuracies,
    curve,
    figure_clients,
    figure_curves,
    figure_heat,
    heat_values,
)
from fedprompt.compare.load import load_rows
from fedprompt.compare.metrics import KNOWN, choose, look_up, metric
from fedprompt.compare.statistics import column, holm, paired_p
from fedprompt.compare.table import (
    comma_separated,
    compare_rows,
    escape,
    latex,
    markdown,
    terminal,
)
from fedprompt.errors import UserError
from fedprompt.sweep.live import Board
from fedprompt.sweep.plan import expand, load_sweep, write_plan
from fedprompt.sweep.run import run_serial

PARTS = {
    "global": ("global", "accuracy"),
    "personal": ("personal", "mean"),
    "worst": ("personal", "worst"),
    "p10": ("personal", "p10"),
    "personal_on_global": ("personal_on_global", "mean"),
}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rows x two values x three seeds, really run."""
    folder = tmp_path_factory.mktemp("sweep")
    content = {
        "experiment": "benchmark",
        "seeds": [1, 2, 3],
        "common": [
            "data.images_per_class=8", "data.domains=[savanna]", "partition.alpha=1",
            "federation.rounds=2", "training.batch_size=8", "evaluation.every=2",
        ],
        "rows": {"A_b & 50 %": ["method=promptfl"], "FedRSCLIP": []},
        "grid": {"partition.clients": [2, 3]},
    }  # fmt: skip
    file = folder / "table.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    described, out = load_sweep(file), folder / "out"
    runs = expand(described, out)
    write_plan(described, runs, out, [])
    board = Board(runs, 1, Console(quiet=True))
    run_serial(runs, board)
    assert not board.failures
    return out


def recomputed(folder: Path, row: str) -> dict[str, dict[int, float]]:
    """Each metric's value by seed of one row, from config.yaml and metrics.jsonl alone."""
    found: dict[str, dict[int, float]] = {name: {} for name in (*PARTS, "bytes")}
    for config_file in folder.glob("*/config.yaml"):
        config = yaml.safe_load(config_file.read_text())
        method = {"promptfl": "A_b & 50 %", "fedrsclip": "FedRSCLIP"}[config["method"]["name"]]
        if f"{method}, clients {config['partition']['clients']}" != row:
            continue
        text = (config_file.parent / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        own = lines[-1]["personal"]["accuracy"]
        assert math.isclose(statistics.fmean(own), lines[-1]["personal"]["mean"])
        for name, (part, key) in PARTS.items():
            found[name][config["seed"]] = lines[-1][part][key]
        found["bytes"][config["seed"]] = sum(x["bytes_up"] + x["bytes_down"] for x in lines)
    return found


class TestAgainstMetrics:
    """The tables of a real sweep."""

    def table(self, sweep: Path) -> list[dict[str, str]]:
        rows = load_rows([sweep]).rows
        text = comma_separated(compare_rows(rows, choose(None, rows)))
        return list(csv.DictReader(io.StringIO(text)))

    def test_csv(self, sweep: Path) -> None:
        lines = self.table(sweep)
        assert [line["row"] for line in lines] == [
            "A_b & 50 %, clients 2", "A_b & 50 %, clients 3",
            "FedRSCLIP, clients 2", "FedRSCLIP, clients 3",
        ]  # fmt: skip
        for line in lines:
            for name, by_seed in recomputed(sweep, line["row"]).items():
                values = list(by_seed.values())
                assert len(values) == int(line[f"{name} n"]) == 3
                assert float(line[f"{name} mean"]) == pytest.approx(statistics.fmean(values))
                assert float(line[f"{name} std"]) == pytest.approx(
                    statistics.pstdev(values), abs=1e-12
                )

    def test_p_values(self, sweep: Path) -> None:
        lines = self.table(sweep)
        values = {line["row"]: recomputed(sweep, line["row"])["personal"] for line in lines}
        best = max(values, key=lambda row: statistics.fmean(values[row].values()))
        raw = {
            row: stats.ttest_rel([values[best][s] for s in (1, 2, 3)],
                                 [by_seed[s] for s in (1, 2, 3)]).pvalue
            for row, by_seed in values.items() if row != best
        }  # fmt: skip
        ordered, corrected, highest = sorted(raw, key=lambda r: raw[r]), {}, 0.0
        for rank, row in enumerate(ordered):
            highest = max(highest, min(1.0, raw[row] * (3 - rank)))
            corrected[row] = highest
        for line in lines:
            if line["row"] == best:
                assert line["personal p"] == ""
            else:
                assert float(line["personal p"]) == pytest.approx(corrected[line["row"]])

    def test_markdown_and_terminal_print_the_same_cells(self, sweep: Path) -> None:
        rows = load_rows([sweep]).rows
        table = compare_rows(rows, choose("personal,global", rows))
        out = io.StringIO()
        Console(file=out, width=100).print(terminal(table))
        for line in markdown(table).splitlines()[2:6]:
            name, personal, whole = (c.strip(" *\\") for c in line.strip("|").split("|"))
            by_metric = recomputed(sweep, name)
            for cell, key in ((personal, "personal"), (whole, "global")):
                values = [100 * v for v in by_metric[key].values()]
                expected = f"{statistics.fmean(values):.1f} ± {statistics.pstdev(values):.1f}"
                assert cell == expected
                assert expected in out.getvalue()

    def test_curves(self, sweep: Path) -> None:
        row = load_rows([sweep]).rows[3]
        found = curve(row, "personal", "mean")
        assert found.rounds_R == [0, 2], "evaluation.every=2"
        by_seed = recomputed(sweep, row.name)
        assert found.mean_R[-1] == pytest.approx(statistics.fmean(by_seed["personal"].values()))
        assert found.std_R[-1] == pytest.approx(statistics.pstdev(by_seed["personal"].values()))
        assert found.bytes_R[-1] == pytest.approx(statistics.fmean(by_seed["bytes"].values()))
        assert found.bytes_R[0] == 0

    def test_heat_map(self, sweep: Path) -> None:
        rows = load_rows([sweep]).rows
        keys = ("partition.clients", "method.name")
        across, down, table = heat_values(rows, keys, KNOWN["personal"])
        assert (across, down) == ([2, 3], ["promptfl", "fedrsclip"])
        for y, name in enumerate(("A_b & 50 %", "FedRSCLIP")):
            for x, clients in enumerate((2, 3)):
                values = recomputed(sweep, f"{name}, clients {clients}")["personal"].values()
                assert table[y, x] == pytest.approx(statistics.fmean(values))
        figure = figure_heat(rows, keys, KNOWN["personal"])
        shown = [t.get_text() for t in figure.axes[0].texts]
        assert shown == [f"{100 * v:.1f}" for v in table.flat]
        with pytest.raises(UserError, match=r"differ in method\.name"):
            heat_values(rows, ("partition.clients", "partition.alpha"), KNOWN["personal"])
        with pytest.raises(UserError, match=r"setting 'partition\.client'"):
            heat_values(rows, ("partition.client", "method.name"), KNOWN["personal"])

    def test_clients(self, sweep: Path) -> None:
        row = load_rows([sweep]).rows[1]
        expected = []
        for file in sorted(sweep.glob("a_b-50-clients3-*/metrics.jsonl")):
            expected += json.loads(file.read_text().splitlines()[-1])["personal"]["accuracy"]
        assert sorted(client_accuracies(row)) == sorted(expected)
        assert len(expected) == 9
        figure = figure_clients([row])
        assert isinstance(figure, Figure)

    def test_every_form_and_figure_from_the_command_line(self, sweep: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        heat = ["--heat", "partition.clients", "method.name"]
        done = CliRunner().invoke(
            app, ["compare", str(sweep), "--format", "latex", "--out", str(out), *heat]
        )
        assert done.exit_code == 0, done.output
        assert {p.name for p in out.iterdir()} == {
            "table.md", "table.csv", "table.tex",
            "curves.png", "bytes.png", "clients.png", "heat.png",
        }  # fmt: skip
        assert (out / "table.tex").read_text() in done.stdout
        assert r"A\_b \& 50 \%, clients 2 & " in done.stdout
        assert len(re.findall(r"\\(?:top|mid|bottom)rule", done.stdout)) == 3
        assert r"\textbf{" in done.stdout

    def test_where_and_single_runs(self, sweep: Path) -> None:
        rows = load_rows([sweep], ["method.name=fedrsclip", "partition.clients=3"]).rows
        assert [row.name for row in rows] == ["FedRSCLIP, clients 3"]
        loose = load_rows(sorted(sweep.glob("*clients3*"))).rows
        assert [row.name for row in loose] == ["promptfl", "fedrsclip"]
        assert all(sorted(row.runs) == [1, 2, 3] for row in loose)
        with pytest.raises(UserError, match=r"no finished run with seed=9"):
            load_rows([sweep], ["seed=9"])

    def test_runs_of_another_plan_and_unfinished_ones_are_left_out(
        self, sweep: Path, tmp_path: Path
    ) -> None:
        plan = json.loads((sweep / "sweep.json").read_text())
        some = {**plan, "runs": [*plan["runs"][:3], {**plan["runs"][3], "name": "not yet"}]}
        (tmp_path / "sweep.json").write_text(json.dumps(some))
        for folder in sweep.iterdir():
            if folder.is_dir():
                (tmp_path / folder.name).symlink_to(folder)
        found = load_rows([tmp_path])
        assert [row.name for row in found.rows] == ["A_b & 50 %, clients 2"]
        assert found.notes == [
            f"{tmp_path}: 9 runs of other plans are left out.",
            "1 runs are not finished and are left out.",
        ]
        (tmp_path / "sweep.json").write_text("{}")
        with pytest.raises(UserError, match="is damaged"):
            load_rows([tmp_path])


class TestStatistics:
    """Small exact numbers."""

    def test_paired_tests_are_scipys_over_common_seeds(self) -> None:
        a, b = {1: 0.5, 2: 0.7, 3: 0.6, 9: 0.1}, {1: 0.4, 2: 0.65, 3: 0.58, 8: 0.9}
        x, y = [0.5, 0.7, 0.6], [0.4, 0.65, 0.58]
        assert paired_p(a, b, "t") == pytest.approx(stats.ttest_rel(x, y).pvalue)
        assert paired_p(a, b, "wilcoxon") == pytest.approx(stats.wilcoxon(x, y).pvalue)
        assert paired_p(a, b, "none") is None
        assert paired_p({1: 0.5}, {1: 0.4}, "t") is None
        assert paired_p({1: 0.5, 2: 0.6}, {3: 0.4, 4: 0.3}, "t") is None

    def test_equal_rows_and_constant_differences(self) -> None:
        a = {1: 0.5, 2: 0.7, 3: 0.6}
        assert paired_p(a, a, "t") == 1.0
        # A t-test would call this p = 0: a spread of nothing but rounding.
        assert paired_p(a, {s: v - 0.1 for s, v in a.items()}, "t") is None

    def test_holm(self) -> None:
        assert holm([0.01, None, 0.04, 0.03]) == [0.03, None, pytest.approx(0.06), 0.06]
        assert holm([0.5, 0.9]) == [1.0, 1.0]

    def test_best_and_marks(self) -> None:
        good = {s: 0.8 + 0.001 * s for s in range(5)}
        bad = {s: 0.5 + 0.01 * s for s in range(5)}
        cells = column([bad, good, {}], higher_is_better=True, test="t")
        assert [c.best for c in cells] == [False, True, False]
        assert [c.differs for c in cells] == [True, False, False]
        assert cells[0].p == pytest.approx(
            stats.ttest_rel(list(good.values()), list(bad.values())).pvalue
        )
        assert [c.best for c in column([bad, good], higher_is_better=False, test="t")] == [
            True, False,
        ]  # fmt: skip
        assert not any(c.best for c in column([bad, good], higher_is_better=None, test="t"))
        assert not any(c.best for c in column([bad], higher_is_better=True, test="t"))
        assert all(c.best for c in column([bad, dict(bad)], higher_is_better=True, test="t"))


ROWS = [{"model": "global", "new": 0.1}, {"model": "personal", "new": 0.2}]
SUMMARY = {
    "global": {"accuracy": None},
    "protocols": {
        "base_to_new": {"rows": ROWS},
        "communication": {"curves": {"personal": {"reached": [{"percent": 95.0, "up": 7}]}}},
    },
}


class TestMetrics:
    """Names and paths."""

    def test_elements_of_lists_go_by_their_first_value(self) -> None:
        assert look_up(SUMMARY, "protocols.base_to_new.rows.personal.new") == 0.2
        path = "protocols.communication.curves.personal.reached.95.up"
        assert look_up(SUMMARY, path) == 7
        assert KNOWN["new"].value(SUMMARY) == 0.2
        assert KNOWN["global"].value(SUMMARY) is None
        for missing in ("protocols.base_to_new.rows.local.new", "a.b", "global.accuracy.x"):
            assert look_up(SUMMARY, missing) is None

    def test_names_are_checked(self) -> None:
        assert metric("a.b:min").higher_is_better is False
        assert metric("a.b").higher_is_better is True
        with pytest.raises(UserError, match="Did you mean 'personal'"):
            metric("persnal")
        with pytest.raises(UserError, match="after ':' comes min or max"):
            metric("a.b:low")


def test_latex_has_no_character_that_latex_reads() -> None:
    assert escape(r"a_b & 5 % {x} \y ~ ^ # $ ± <>") == (
        r"a\_b \& 5 \% \{x\} \textbackslash{}y \textasciitilde{} \textasciicircum{} \# \$ $\pm$ "
        r"\textless{}\textgreater{}"
    )


def test_wrong_input_is_one_line(sweep: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ([str(tmp_path / "none")], "there is no folder"),
        ([str(tmp_path)], "holds no run"),
        ([str(sweep), "--format", "html"], "--format 'html' is unknown"),
        ([str(sweep), "--test", "welch"], "--test 'welch' is unknown"),
        ([str(sweep), "--metrics", "new"], "no run has measured 'new'"),
        ([str(sweep), "--metrics", "global.acuracy"], "Did you mean 'accuracy'"),
        ([str(sweep), "--where", "seed"], "is not KEY=VALUE"),
        ([str(sweep), "--heat", "seed", "seed"], "say where with --out"),
        ([str(sweep), "--protocol", "few_shot"], "holds no results of protocol"),
    ):
        done = CliRunner().invoke(app, ["compare", *arguments])
        assert isinstance(done.exception, UserError), done.output
        assert message in str(done.exception)


def test_many_rows_fit_80_columns_and_figures(sweep: Path) -> None:
    rows = load_rows([sweep]).rows
    table = compare_rows(rows, choose(None, rows))
    out = io.StringIO()
    Console(file=out, width=80).print(terminal(table, 80))
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "Left out for want of room: " in out.getvalue().replace("\n", " ")
    assert "…" not in out.getvalue()
    assert out.getvalue().count(" ± ") >= 8
    figure = figure_curves(rows * 5)
    assert figure is not None
    assert "first 16 of 20 rows" in figure.get_suptitle()
    assert all(len(axes.lines) == 16 for axes in figure.axes)
    over_bytes: Any = figure_curves(rows, over_bytes=True)
    x = np.concatenate([line.get_xdata() for line in over_bytes.axes[0].lines])
    assert x.max() * 2**20 == pytest.approx(
        max(statistics.fmean(recomputed(sweep, r.name)["bytes"].values()) for r in rows)
    )


def test_wilcoxon_says_when_it_cannot_decide(sweep: Path) -> None:
    rows = load_rows([sweep]).rows
    note = compare_rows(rows, [KNOWN["personal"]], "wilcoxon").note
    assert "With 3 seeds this test cannot reach p < 0.05" in note
    assert "cannot reach" not in compare_rows(rows, [KNOWN["personal"]], "t").note
    untested = compare_rows(rows, [KNOWN["personal"]], "none")
    assert "test" not in untested.note
    assert "$^{*}$" not in latex(untested)
