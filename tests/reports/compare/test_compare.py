"""Comparisons: tables against an independent recomputation from metrics.jsonl, tests, figures."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console
from scipy import stats
from typer.testing import CliRunner

from fedprompt.cli.main import app
from fedprompt.errors import UserError
from fedprompt.files.checksums import CHECKSUMS
from fedprompt.reports.compare.figures import (
    AT_FIRST,
    client_accuracies,
    clients_figure,
    curves_figure,
    heat_figure,
    heat_values,
    seed_curve,
)
from fedprompt.reports.compare.load import load_rows
from fedprompt.reports.compare.metrics import KNOWN, choose, look_up, metric
from fedprompt.reports.compare.statistics import column, holm, paired_p
from fedprompt.reports.compare.table import compare_rows, escape, latex, terminal
from fedprompt.reports.compare.table import text as printed_as
from fedprompt.reports.figure import Boxes, Heat, Lines
from fedprompt.sweeps.live import Board
from fedprompt.sweeps.plan import expand, load_sweep, write_plan
from fedprompt.sweeps.run import run_serial
from tests.support import recompute
from tests.support.fake_runs import edit_summary, write_run


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
            "output.report=false",
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


@pytest.fixture(scope="module")
def apart(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sweep, one row of it so much worse that tests must find it.

    Its accuracies are lowered in metrics.jsonl and in summary.json alike.
    """
    folder = tmp_path_factory.mktemp("apart") / "out"
    shutil.copytree(sweep, folder)
    for seed, run in recompute.rows_of(folder)["FedRSCLIP, clients 2"].items():
        factor = 0.2 + 0.01 * seed
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((run / "summary.json").read_text())
        for part in (lines[-1], summary):
            part["global"]["accuracy"] *= factor
            for whose in ("personal", "personal_on_global"):
                for key in ("mean", "std", "worst", "p10"):
                    part[whose][key] *= factor
                part[whose]["accuracy"] = [a * factor for a in part[whose]["accuracy"]]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        (run / "summary.json").write_text(json.dumps(summary))
        # Otherwise the files would count as damaged.
        (run / CHECKSUMS).unlink()
    return folder


TITLES = {
    "global": "global", "personal": "personalised", "worst": "worst client", "p10": "10th pct.",
    "personal_on_global": "personal on global test", "numbers_up": "numbers up",
    "bytes": "MiB sent",
}  # fmt: skip


COSTS = ("numbers_up", "bytes")
TABLES = ("table", "personal_by_condition", "global_by_condition")


@dataclass(frozen=True)
class Expected:
    """One cell as it must be printed."""

    body: str
    best: bool
    starred: bool


def expected_cells(folder: Path) -> dict[str, list[Expected]]:
    """Every row's cells, from tests/support/recompute.py alone."""
    table = recompute.table(folder)
    cells: dict[str, list[Expected]] = {row: [] for row in table}
    for name in TITLES:
        by_row = {row: columns[name] for row, columns in table.items()}
        cost = name in COSTS
        best, p = (set(), {}) if cost else recompute.columns(folder, by_row)
        for row, by_seed in by_row.items():
            values = list(by_seed.values())
            middle, spread = recompute.mean(values), recompute.deviation(values)
            if name == "numbers_up":
                body = f"{middle:,.0f}"
            else:
                scale, digits = (2.0**-20, 2) if name == "bytes" else (100, 1)
                body = f"{scale * middle:.{digits}f}"
                if not cost or round(scale * spread, digits):
                    body += f" ± {scale * spread:.{digits}f}"
            cells[row].append(Expected(body, row in best, p.get(row, 1) < 0.05))
    return cells


def command(folder: Path, *arguments: str) -> str:
    done = CliRunner().invoke(app, ["compare", str(folder), *arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.stdout


class TestAgainstMetrics:
    """Tables of real sweeps against tests/support/recompute.py, which shares no code with us."""

    @pytest.fixture(params=["sweep", "apart"])
    def folder(self, request: pytest.FixtureRequest) -> Path:
        found: Path = request.getfixturevalue(request.param)
        return found

    def test_the_recomputed_statistics_are_those_of_scipy(self) -> None:
        a, b = {1: 0.5, 2: 0.7, 3: 0.6, 4: 0.1}, {1: 0.4, 2: 0.65, 3: 0.58, 5: 0.9}
        for n in (2, 3):
            x, y = [0.5, 0.7, 0.6][:n], [0.4, 0.65, 0.58][:n]
            some = {s: v for s, v in b.items() if s <= n}
            assert recompute.paired_p(a, some) == pytest.approx(stats.ttest_rel(x, y).pvalue)
        assert recompute.quantile([3, 1, 2], 0.1) == pytest.approx(np.percentile([1, 2, 3], 10))

    def test_csv_has_mean_std_seeds_and_p(self, folder: Path) -> None:
        lines = list(csv.DictReader(io.StringIO(command(folder, "--format", "csv"))))
        table = recompute.table(folder)
        assert [line["row"] for line in lines] == list(table) == [
            "A_b & 50 %, clients 2", "A_b & 50 %, clients 3",
            "FedRSCLIP, clients 2", "FedRSCLIP, clients 3",
        ]  # fmt: skip
        for name in TITLES:
            by_row = {row: columns[name] for row, columns in table.items()}
            p = {} if name in COSTS else recompute.columns(folder, by_row)[1]
            for line in lines:
                values = list(table[line["row"]][name].values())
                assert len(values) == int(line[f"{name} n"]) == 3
                assert float(line[f"{name} mean"]) == pytest.approx(recompute.mean(values))
                assert float(line[f"{name} std"]) == pytest.approx(
                    recompute.deviation(values), abs=1e-12
                )
                if line["row"] in p:
                    assert float(line[f"{name} p"]) == pytest.approx(p[line["row"]], rel=1e-6)
                else:
                    assert line[f"{name} p"] == ""

    def test_markdown(self, folder: Path) -> None:
        lines = command(folder, "--format", "markdown").splitlines()
        assert lines[0] == f"|  | {' | '.join(TITLES.values())} |"
        for line, (row, cells) in zip(lines[2:6], expected_cells(folder).items(), strict=True):
            shown = [row]
            for cell in cells:
                body = f"**{cell.body}**" if cell.best else cell.body
                shown.append(body + r"\*" * cell.starred)
            assert line == f"| {' | '.join(shown)} |"

    def test_latex(self, folder: Path) -> None:
        lines = command(folder, "--format", "latex").splitlines()
        start = lines.index(r"    \midrule") + 1
        assert lines[start + 4] == r"    \bottomrule"
        for line, (row, cells) in zip(
            lines[start : start + 4], expected_cells(folder).items(), strict=True
        ):
            shown = [row.replace("_", r"\_").replace("&", r"\&").replace("%", r"\%")]
            for cell in cells:
                body = cell.body.replace("±", r"$\pm$")
                body = rf"\textbf{{{body}}}" if cell.best else body
                shown.append(body + "$^{*}$" * cell.starred)
            assert line == f"    {' & '.join(shown)} \\\\"

    def test_terminal(self, folder: Path) -> None:
        rows = load_rows([folder]).rows
        out = io.StringIO()
        table = terminal(compare_rows(rows, choose(None, rows)), 200)
        Console(file=out, width=200, force_terminal=True, color_system="standard").print(table)
        text = out.getvalue().replace("\x1b[0m", "")
        for row, cells in expected_cells(folder).items():
            line = next(x for x in text.splitlines() if row in x)
            found = re.findall(r"(\x1b\[1m)? *([\d.,]+(?: ± [\d.]+)?)(\*?)", line.split(row)[1])
            assert [(bool(b), body, bool(star)) for b, body, star in found] == [
                (cell.best, cell.body, cell.starred) for cell in cells
            ]

    def test_in_a_file_the_best_are_marked(self, folder: Path) -> None:
        done = CliRunner().invoke(app, ["compare", str(folder)], env={"COLUMNS": "200"})
        for row, cells in expected_cells(folder).items():
            line = next(x for x in done.stdout.splitlines() if row in x)
            found = re.findall(r"[\d.,]+(?: ± [\d.]+)?(\^?)", line.split(row)[1])
            assert [bool(mark) for mark in found] == [cell.best for cell in cells if cell.body]
        assert "^: best mean" in " ".join(done.stdout.split())

    def test_the_worse_row_is_starred(self, apart: Path) -> None:
        cells = expected_cells(apart)
        assert [c.starred for c in cells["FedRSCLIP, clients 2"]][:2] == [True, True]
        # Five accuracies, each with a best row in either condition.
        assert sum(c.best for line in cells.values() for c in line) == 10

    def test_curves(self, sweep: Path) -> None:
        runs = recompute.rows_of(sweep)
        for row in load_rows([sweep]).rows:
            for part, key in (("global", "accuracy"), ("personal", "mean")):
                expected = recompute.curve(runs[row.name], part, key)
                found = seed_curve(row, part, key)
                assert found.rounds_R == list(expected) == [0, 2], "evaluation.every=2"
                points = zip(found.bytes_R, found.mean_R, found.std_R, strict=True)
                for point, numbers in zip(points, expected.values(), strict=True):
                    assert point == pytest.approx(numbers, abs=1e-12)
                assert found.bytes_R[0] == 0

    def test_heat_map(self, sweep: Path) -> None:
        rows = load_rows([sweep]).rows
        keys = ("partition.clients", "method.name")
        across, down, table = heat_values(rows, keys, KNOWN["personal"])
        assert (across, down) == ([2, 3], ["promptfl", "fedrsclip"])
        for y, name in enumerate(("A_b & 50 %", "FedRSCLIP")):
            for x, clients in enumerate((2, 3)):
                by_seed = recompute.table(sweep)[f"{name}, clients {clients}"]["personal"]
                assert table[y, x] == pytest.approx(recompute.mean(list(by_seed.values())))
        (panel,) = heat_figure(rows, keys, KNOWN["personal"]).panels
        assert isinstance(panel, Heat)
        assert panel.cells == table.tolist()
        assert (list(panel.columns), list(panel.rows)) == (["2", "3"], ["promptfl", "fedrsclip"])
        with pytest.raises(UserError, match=r"differ in method\.name"):
            heat_values(rows, ("partition.clients", "partition.alpha"), KNOWN["personal"])
        with pytest.raises(UserError, match=r"setting 'partition\.client'"):
            heat_values(rows, ("partition.client", "method.name"), KNOWN["personal"])

    def test_clients(self, sweep: Path) -> None:
        runs = recompute.rows_of(sweep)
        rows = load_rows([sweep]).rows
        for row in rows:
            expected = [
                a
                for run in runs[row.name].values()
                for a in recompute.tested(recompute.rounds_of(run)[-1], "personal")
            ]
            assert sorted(client_accuracies(row)) == sorted(expected)
            assert len(expected) == 3 * int(row.name[-1])
        figure = clients_figure(rows[1:2])
        assert figure is not None
        (panel,) = figure.panels
        assert isinstance(panel, Boxes)
        (group,) = panel.groups
        accuracies = client_accuracies(rows[1])
        assert group.q1 == pytest.approx(recompute.quantile(accuracies, 0.25))
        assert group.q3 == pytest.approx(recompute.quantile(accuracies, 0.75))
        assert (group.low, group.high) == (min(accuracies), max(accuracies))

    def test_every_form_and_figure_from_the_command_line(self, sweep: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        heat = ["--heat", "partition.clients", "method.name"]
        done = CliRunner().invoke(
            app, ["compare", str(sweep), "--format", "latex", "--out", str(out), *heat]
        )
        assert done.exit_code == 0, done.output
        assert {p.name for p in out.iterdir()} == {
            *(f"{name}{end}" for name in TABLES for end in (".md", ".csv", ".tex")),
            "curves.png", "bytes.png", "clients.png", "heat.png",
        }  # fmt: skip
        assert (out / "table.tex").read_text() in done.stdout
        assert r"A\_b \& 50 \%, clients 2 & " in done.stdout
        assert len(re.findall(r"\\(?:top|mid|bottom)rule", done.stdout)) == 3 * len(TABLES)
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
            "1 run is not finished and is left out.",
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

    def test_some_costs_are_shown_on_request(self, tmp_path: Path) -> None:
        edit_summary(write_run(tmp_path), client_steps=120, seconds=1.5, peak_memory_bytes=2**30)
        rows = load_rows([tmp_path]).rows
        names = [m.name for m in choose(None, rows)]
        assert "bytes" in names
        assert not {"client_steps", "seconds", "peak_memory"} & {*names}
        table = compare_rows(rows, choose("client_steps,seconds,peak_memory", rows))
        assert [printed_as(m, c) for m, c in zip(table.metrics, table.cells[0], strict=True)] == [
            "120",
            "1.5",
            "1024.00",
        ]

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
        ([str(sweep), "--heat", "seed", "seed"], "--out"),
        ([str(sweep), "--protocol", "few_shot"], "holds no results of protocol"),
    ):
        done = CliRunner().invoke(app, ["compare", *arguments])
        assert isinstance(done.exception, UserError), done.output
        assert message in str(done.exception)


@pytest.mark.parametrize("width", [80, 50, 30])
def test_no_number_is_cut_in_a_narrow_terminal(sweep: Path, width: int) -> None:
    rows = load_rows([sweep]).rows
    table = compare_rows(rows, choose(None, rows))
    assert len(table.metrics) >= 7
    out = io.StringIO()
    Console(file=out, width=width).print(terminal(table, width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in out.getvalue()
    body = out.getvalue().partition("Accuracy in percent")[0]
    assert all(word in body.split() for m in table.metrics for word in m.title.split())
    cells = Counter(
        printed_as(metric, cell)
        for line in table.cells
        for metric, cell in zip(table.metrics, line, strict=True)
    )
    for cell, times in cells.items():
        assert len(re.findall(rf"(?<= ){re.escape(cell)}(?= |\n)", body)) >= times, cell


def test_figures_of_many_rows(sweep: Path) -> None:
    rows = load_rows([sweep]).rows
    figure = curves_figure(rows * 5)
    assert figure is not None
    assert f"best {AT_FIRST} of 20" in figure.caption
    for panel in figure.panels:
        assert isinstance(panel, Lines)
        assert len(panel.curves) == 20
        shown = [curve.y[-1] for curve in panel.curves if curve.on]
        hidden = [curve.y[-1] for curve in panel.curves if not curve.on]
        assert len(shown) >= AT_FIRST
        assert min(shown) > max(hidden)
    over_bytes = curves_figure(rows, over_bytes=True)
    assert over_bytes is not None
    (panel, _) = over_bytes.panels
    assert isinstance(panel, Lines)
    sent = [x for curve in panel.curves for x in curve.x]
    assert min(sent) > 0, "the axis is logarithmic"
    assert max(sent) == pytest.approx(
        max(recompute.mean(list(c["bytes"].values())) for c in recompute.table(sweep).values())
    )


def test_wilcoxon_says_when_it_cannot_decide(sweep: Path) -> None:
    rows = load_rows([sweep]).rows
    note = compare_rows(rows, [KNOWN["personal"]], "wilcoxon").note
    assert "With 3 seeds this test cannot reach p < 0.05" in note
    assert "cannot reach" not in compare_rows(rows, [KNOWN["personal"]], "t").note
    untested = compare_rows(rows, [KNOWN["personal"]], "none")
    assert "test" not in untested.note
    assert "$^{*}$" not in latex(untested)
