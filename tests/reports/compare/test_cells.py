"""Rows are compared under equal conditions only, and stand side by side in pivoted tables."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedprompt.cli.compare import tables_of
from fedprompt.cli.main import app
from fedprompt.errors import UserError
from fedprompt.reports.compare.cells import cell_keys, cell_name, cells_of, method_names
from fedprompt.reports.compare.figures import curves_figure
from fedprompt.reports.compare.load import Row, load_rows
from fedprompt.reports.compare.metrics import KNOWN, choose
from fedprompt.reports.compare.notes import selection_note, unlike_settings
from fedprompt.reports.compare.statistics import Cell
from fedprompt.reports.compare.table import compare_rows, latex, markdown, terminal
from fedprompt.reports.figure import Lines
from tests.support.fake_runs import change_config, scale_accuracies, write_run

FACTORS = {  # accuracy by method, number of clients and seed
    "promptfl": {3: (0.80, 0.81, 0.83), 5: (0.60, 0.59, 0.62)},
    "fedrsclip": {3: (0.70, 0.72, 0.71), 5: (0.75, 0.77, 0.75)},
    "coop_local": {3: (0.40, 0.41, 0.44), 5: (0.50, 0.48, 0.52)},
}
TOKENS = {"promptfl": 16, "coop_local": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three methods on an easy and on a hard partition, three seeds each."""
    out = tmp_path_factory.mktemp("grid")
    for method, by_clients in FACTORS.items():
        for clients, factors in by_clients.items():
            for seed, factor in enumerate(factors, start=1):
                run = write_run(out / f"{method}-{clients}-{seed}", clients=clients)
                section: dict[str, Any] = {"name": method, "context_tokens": TOKENS.get(method)}
                if method == "fedrsclip":
                    section = {"name": method, "shared_tokens": 4, "private_tokens": 4}
                change_config(run, seed=seed, partition={"clients": clients}, method=section)
                scale_accuracies(run, factor)
    return out


def row(name: str, label: str = "", grid: dict[str, Any] | None = None, **settings: Any) -> Row:
    keys = {key.replace("__", "."): value for key, value in settings.items()}
    return Row(name, "runs", {"method.name": name, **keys}, label, grid or {})


def test_only_rows_of_the_same_data_are_compared(folder: Path) -> None:
    rows = load_rows([folder]).rows
    assert cell_keys(rows) == ["partition.clients"]
    table = compare_rows(rows, [KNOWN["personal"]])
    best = {name for name, (cell,) in zip(table.names, table.cells, strict=True) if cell.best}
    assert best == {"promptfl, clients 3", "fedrsclip, clients 5"}
    # Without cells, PromptFL with 3 clients would be the only best row, and all others tested
    # against it: five tests, not two and two.
    for group in cells_of(rows):
        alone = compare_rows([rows[i] for i in group], [KNOWN["personal"]])
        assert [table.cells[i][0] for i in group] == [line[0] for line in alone.cells]
        assert sum(table.cells[i][0].p is None for i in group) == 1
    assert "the same partition.clients" in table.note


def test_a_grid_and_a_data_set_make_cells_but_methods_do_not() -> None:
    swept = [
        row("a", "A", {"federation.fraction": f, "strategy": s}, federation__fraction=f,
            strategy__name=s, data__title=d, data__classes=n)
        for f in (0.1, 1.0) for s in ("fedavg", "krum") for d, n in (("aid", 30), ("ucm", 21))
    ]  # fmt: skip
    # The number of classes follows from the data set, whose title is enough.
    assert cell_keys(swept) == ["data.title", "federation.fraction"]
    assert [len(cell) for cell in cells_of(swept)] == [2, 2, 2, 2]
    assert cell_name(swept[0], cell_keys(swept)) == "aid, fraction 0.1"
    assert method_names(swept)[:3] == [
        "A, strategy fedavg",
        "A, strategy fedavg",
        "A, strategy krum",
    ]
    trained = [row("a", training__lr=lr, backbone__device=d) for lr, d in ((1, "cpu"), (2, "cuda"))]
    assert cell_keys(trained) == []
    assert cell_keys([row("a", partition__shots=s) for s in (1, 2)]) == ["partition.shots"]


def test_rows_that_are_conditions_themselves_are_not_compared() -> None:
    rows = [row("a", f"K = {k}", partition__clients=k) for k in (5, 10)]
    for one in rows:
        one.runs = {}
    assert [len(cell) for cell in cells_of(rows)] == [1, 1]


def test_a_pivoted_table_has_the_cells_of_the_comparison(folder: Path) -> None:
    rows = load_rows([folder]).rows
    long, *pivoted = tables_of(rows, choose(None, rows))
    assert [table.name for table in pivoted] == ["personal", "global"]
    table = pivoted[0]
    assert table.names == ("coop_local", "fedrsclip", "promptfl")
    assert [metric.title for metric in table.metrics] == ["clients 3", "clients 5"]
    column = [metric.name for metric in long.metrics].index("personal")
    for i, name in enumerate(long.names):
        method, _, condition = name.partition(", ")
        place = table.names.index(method), ["clients 3", "clients 5"].index(condition)
        assert table.cells[place[0]][place[1]] == long.cells[i][column]
    mean = {c: 100 * table.cells[1][i].mean for i, c in enumerate((3, 5))}  # type: ignore[operator]
    lines = markdown(table).splitlines()
    assert lines[0].startswith("Personalised")
    assert lines[2] == "|  | clients 3 | clients 5 |"
    assert f"{mean[3]:.1f}" in lines[5]
    assert f"**{mean[5]:.1f}" in lines[5]
    assert rf"\textbf{{{mean[5]:.1f}" in latex(table)
    assert "clients 3 & clients 5" in latex(table)
    out = io.StringIO()
    Console(file=out, width=80).print(terminal(table, 80, bold=False))
    assert "^" in next(line for line in out.getvalue().splitlines() if "fedrsclip" in line)


def test_a_missing_combination_is_a_dash(folder: Path, tmp_path: Path) -> None:
    for run in folder.iterdir():
        if not run.name.startswith("coop_local-5"):
            (tmp_path / run.name).symlink_to(run)
    rows = load_rows([tmp_path]).rows
    _, table, _ = tables_of(rows, choose(None, rows))
    assert table.cells[0][1] == Cell({})
    assert markdown(table).splitlines()[4].endswith(" - |")


def test_forms_and_files(folder: Path, tmp_path: Path) -> None:
    def shown(*options: str) -> str:
        done = CliRunner().invoke(app, ["compare", str(folder), *options], env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        return done.stdout

    assert "by condition" in shown()
    long = shown("--format", "csv", "--out", str(tmp_path / "out"))
    assert len(list(csv.DictReader(io.StringIO(long)))) == 6, "one table for programs"
    wide = list(csv.DictReader(io.StringIO(shown("--pivot", "worst", "--format", "csv"))))
    assert [line["row"] for line in wide] == ["coop_local", "fedrsclip", "promptfl"]
    assert int(wide[0]["worst: clients 5 n"]) == 3
    for end in ("md", "csv", "tex"):
        assert (tmp_path / "out" / f"personal_by_condition.{end}").is_file()
    page = tmp_path / "report.html"
    done = CliRunner().invoke(app, ["report", str(folder), "--out", str(page)])
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert "Personalised, by condition" in text
    assert '<th scope="col">clients 5</th>' in text


def test_a_table_that_cannot_be_pivoted_is_refused(folder: Path) -> None:
    done = CliRunner().invoke(
        app, ["compare", str(folder), "--where", "partition.clients=3", "--pivot", "personal"]
    )
    assert isinstance(done.exception, UserError)
    assert "--pivot" in str(done.exception)


def test_unequal_tokens_and_budgets_stand_under_the_table(folder: Path) -> None:
    rows = load_rows([folder]).rows
    (tokens,) = unlike_settings(rows)
    assert tokens == "context tokens: 16 (coop_local; promptfl), 4 (fedrsclip)"
    assert tokens in markdown(compare_rows(rows, [KNOWN["personal"]]))
    for one in rows:
        one.settings["training.lr"] = 0.1 if one.name.startswith("promptfl") else 0.02
    assert any(text.startswith("training.lr: 0.02 (") for text in unlike_settings(rows))
    matched = [one for one in rows if not one.name.startswith("fedrsclip")]
    assert not any("tokens" in text for text in unlike_settings(matched))


def test_the_search_that_chose_settings_stands_under_the_table() -> None:
    search = "12 trials by tpe"
    rows = [
        row("a", "a", evaluation__chosen_by=search, evaluation__select="best_validation"),
        row("b", "b", evaluation__chosen_by=search, evaluation__select="best_validation"),
        row("c", "c", evaluation__chosen_by="", evaluation__select="best_validation"),
    ]
    note = selection_note(rows)
    assert f"{search} (a; b)" in note
    assert "not searched (c)" in note
    assert "best on validation images" in note
    plain = row("d", "d", evaluation__select="last")
    assert "evaluation.select: best_validation (a; b; c), last (d)" in selection_note(
        [*rows, plain]
    )
    # Runs of older versions have neither key.
    assert selection_note([plain, row("e", "e")]) == ""


def test_the_plan_of_a_sweep_names_methods_and_grid(folder: Path, tmp_path: Path) -> None:
    runs = []
    for run in folder.iterdir():
        (tmp_path / run.name).symlink_to(run)
        method, clients, seed = run.name.split("-")
        values = {"partition.clients": int(clients)}
        runs.append({"name": run.name, "row": method.upper(), "values": values, "seed": int(seed)})
    runs.sort(key=lambda run: run["name"])
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": runs}))
    rows = load_rows([tmp_path]).rows
    assert rows[0].name == "COOP_LOCAL, clients 3"
    assert (rows[0].label, rows[0].grid) == ("COOP_LOCAL", {"partition.clients": 3})
    assert method_names(rows)[:2] == ["COOP_LOCAL", "COOP_LOCAL"]


@pytest.mark.parametrize("over_bytes", [False, True])
def test_zero_shot_is_a_line_as_long_as_the_others(tmp_path: Path, over_bytes: bool) -> None:
    for name, rounds in (("zero_shot", 0), ("promptfl", 4)):
        change_config(write_run(tmp_path / name, rounds=rounds), method={"name": name})
    figure = curves_figure(load_rows([tmp_path]).rows, over_bytes=over_bytes)
    assert figure is not None
    for panel in figure.panels:
        assert isinstance(panel, Lines)
        trained, still = panel.curves
        assert (trained.name, still.name) == ("promptfl, rounds 4", "zero_shot, rounds 0")
        assert list(still.x) == [trained.x[0], trained.x[-1]]
        assert still.y[0] == still.y[1] != trained.y[-1]
        assert still.dashed
        assert not trained.dashed
