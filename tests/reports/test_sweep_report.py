"""The report of a sweep agrees with its runs' files, needs no other file and trusts no text."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev

import pytest

from fedprompt.errors import UserError
from fedprompt.reports.compare.figures import AT_FIRST
from fedprompt.reports.sweep_report import write_sweep_report
from tests.support.fake_runs import change_config, scale_accuracies, write_run, write_sweep
from tests.support.pages import Page, needs_nothing_else, only_our_script_runs


def value(run: Path, part: str, key: str) -> float:
    return float(json.loads((run / "summary.json").read_text())[part][key])


def test_table_and_curves_are_means_over_seeds(tmp_path: Path) -> None:
    runs = write_sweep(tmp_path)
    html = write_sweep_report(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    needs_nothing_else(html)
    page = Page(html)
    head, *rows = page.tables["groups"]
    assert head[:3] == ["Row", "global", "personalised"]
    pairs = [(runs[i], runs[i + 1]) for i in range(0, len(runs), 2)]
    assert len(rows) == len(pairs)
    for row, pair in zip(rows, pairs, strict=True):
        for cell, part, key in ((row[1], "global", "accuracy"), (row[2], "personal", "mean")):
            numbers = [100 * value(run, part, key) for run in pair]
            assert cell.rstrip("*") == f"{fmean(numbers):.1f} ± {stdev(numbers):.1f} %"
    figures = page.figures
    assert list(figures) == ["heat", "curves", "bytes", "clients"]
    _, over_rounds = figures["curves"]
    for curve, pair in zip(over_rounds["curves"], pairs, strict=True):
        lines = [(run / "metrics.jsonl").read_text().splitlines() for run in pair]
        last = [json.loads(text[2])["global"]["accuracy"] for text in lines]
        assert curve["x"] == [0, 1, 2]
        assert curve["y"][-1] == pytest.approx(fmean(last))
        assert curve["spread"][-1] == pytest.approx(stdev(last))
    sent = figures["bytes"][1]["curves"][0]["x"]
    assert sent == [2 * 8192 * 3, 4 * 8192 * 3]  # up and down, three clients, rounds 1 and 2
    (heat,) = figures["heat"]
    assert (heat["columns"], heat["rows"]) == (["0.1", "1.0"], ["3", "5"])
    expected = fmean(value(run, "personal", "mean") for run in pairs[1])
    assert heat["cells"][1][0] == pytest.approx(expected)
    assert figures["clients"][0]["groups"][1]["count"] == 2 * 5
    assert len(page.tables["runs"]) == 1 + len(runs)


def test_unfinished_and_failed_runs_are_told(tmp_path: Path) -> None:
    runs = write_sweep(tmp_path, alphas=(0.1,))
    (runs[0] / "summary.json").unlink()
    failed = [("other", "NaN in <b>loss</b>")]
    out = write_sweep_report(runs, tmp_path / "r.html", failed=failed, command="fedprompt sweep x")
    page = Page(out.read_text(encoding="utf-8"))
    assert "1 run is not finished" in page.text
    assert page.tables["runs failed"][1] == ["other", "NaN in <b>loss</b>"]
    assert "b" not in page.tags
    assert "fedprompt sweep x" in page.text
    assert "heat" not in page.figures  # only one setting differs


def test_the_command_is_read_from_the_sweeps_plan(tmp_path: Path) -> None:
    folder = tmp_path / "few_shot-quick"
    runs = write_sweep(folder)
    plan = {
        "sweep": "few_shot-quick",
        "file": "/somewhere/few_shot.yaml",
        "overrides": ["training.lr=0.1"],
        "seeds": [1, 2],
        "keys": [],
        "rows": ["one", "two"],
        "runs": [
            {"name": run.name, "row": "one" if i < 2 else "two", "values": {}, "seed": 1 + i % 2}
            for i, run in enumerate(runs[:4])
        ],
    }
    (folder / "sweep.json").write_text(json.dumps(plan))
    page = Page(write_sweep_report([folder], folder / "report.html").read_text(encoding="utf-8"))
    assert "fedprompt sweep few_shot training.lr=0.1 --seeds 1,2 --quick" in page.text
    assert [row[0] for row in page.tables["groups"]] == ["Row", "one", "two"]
    assert "/somewhere" not in page.text


def test_names_are_escaped_and_most_curves_are_off_at_first(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    runs = []
    for i in range(AT_FIRST + 3):
        run = write_run(tmp_path / f"run{i}")
        change_config(run, method={"name": f"{evil}{i}"})
        scale_accuracies(run, 1 - 0.01 * i)
        runs.append(run)
    html = write_sweep_report(runs, tmp_path / "report.html", title=evil).read_text("utf-8")
    only_our_script_runs(html)
    page = Page(html)
    assert page.text.count(evil) > AT_FIRST
    curves = page.figures["curves"][0]["curves"]
    assert [curve["on"] for curve in curves] == [True] * AT_FIRST + [False] * 3
    assert curves[0]["name"] == f"{evil}0"


def test_nothing_finished_is_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=False)
    with pytest.raises(UserError, match="no finished run"):
        write_sweep_report([run], tmp_path / "report.html")
