"""The report of a run holds the numbers of its files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fedprompt.data.partition import dense
from fedprompt.errors import UserError
from fedprompt.experiment.summary import draw_report
from fedprompt.reports.client_figure import MANY
from fedprompt.reports.run_data import accuracy_of, load_run
from fedprompt.reports.run_figures import run_figures
from fedprompt.reports.run_report import client_rows, summary_of, write_report
from tests.support.fake_runs import edit_summary, rewrite, write_run
from tests.support.pages import Page


def report(folder: Path) -> Page:
    return Page(write_report(load_run(folder)).read_text(encoding="utf-8"))


def pct(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def spread(part: dict[str, float]) -> str:
    return f"{100 * part['mean']:.1f} ± {100 * part['std']:.1f} %"


def test_results_table_holds_the_summary_numbers(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    page = report(folder)
    zero, alone = summary["zero_shot"], summary["local_only"]
    own = summary["personal"]
    assert page.tables["results"] == [
        ["", "zero-shot", "local-only", "fedrsclip"],
        ["Global", pct(zero["accuracy"]), "-", pct(summary["global"]["accuracy"])],
        ["Personalised", spread(zero["personal"]), spread(alone["personal"]), spread(own)],
        ["Worst client", *(pct(p["personal"]["worst"]) for p in (zero, alone, summary))],
        ["10th percentile", *(pct(p["personal"]["p10"]) for p in (zero, alone, summary))],
        [
            "Personal on global test",
            "-",
            spread(alone["personal_on_global"]),
            spread(summary["personal_on_global"]),
        ],
    ]


def test_a_backdoor_has_a_line_of_its_own(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    edit_summary(folder, backdoor={"success": 0.125, "without_trigger": 0.0, "attackers": 2})
    assert report(folder).tables["results"][-1] == ["Attack success", "-", "-", "12.5 %"]


def test_headlines_title_and_command(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "my run")
    edit_summary(folder, bytes_up=1_572_864, bytes_down=2048)
    text = report(folder).text
    assert "quickstart: fedrsclip on aerial_scenes" in text
    assert re.search(r"seed 1\n\d{4}-\d\d-\d\d \d\d:\d\d UTC", text)
    assert "Uploaded2,048numbers per client and round" in text
    assert "Traffic up1.5 MiBdown 2.0 KiB, whole run" in text
    assert "fedprompt run 'my run/config.yaml' 'output.dir=my run-again'" in text
    assert str(tmp_path) not in text
    assert "not finished" not in text


def test_client_table_holds_counts_and_accuracies(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", clients=3, untested=(1,))
    run = load_run(folder)
    assert run.partition is not None
    assert run.summary is not None
    own = accuracy_of(run.rounds[-1]["personal"])
    before = accuracy_of(run.summary["zero_shot"]["personal"])
    alone = accuracy_of(run.local_only[-1]["personal"])
    expected = []
    for k in range(3):
        train, test = (dense(run.partition[part], 4)[k] for part in ("train_counts", "test_counts"))
        held = sum(count > 0 for count in train)
        accuracy = ["-"] * 3 if k == 1 else [pct(own[k]), pct(alone[k]), pct(before[k])]
        expected.append([str(k), str(sum(train)), str(sum(test)), str(held), *accuracy])
    assert report(folder).tables["clients"][1:] == expected


def test_of_many_clients_the_lowest_are_listed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", clients=MANY + 50)
    accuracy = accuracy_of(load_run(folder).last("personal"))
    page = report(folder)
    rows = page.tables["clients"][1:]
    assert len(rows) == MANY
    lowest = sorted(accuracy, key=lambda k: (accuracy[k], k))[:MANY]
    assert [int(row[0]) for row in rows] == lowest
    assert f"The {MANY} clients with the lowest accuracy" in page.text


def test_an_unfinished_run_reports_what_was_measured_last(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=3, finished=False)
    rewrite(
        folder / "metrics.jsonl",
        lambda x: x | {"global": None, "personal": None} if x["round"] == 3 else x,
    )
    run = load_run(folder)
    summary = summary_of(run)
    assert summary["global"] == run.rounds[2]["global"]
    assert summary["local_only"]["personal"] == run.local_only[2]["personal"]
    assert summary["bytes_up"] == 3 * 3 * 8192
    page = report(folder)
    assert "not finished: 3 of 3 rounds" in page.text
    assert page.tables["results"][0] == ["", "local-only", "fedrsclip"]
    assert page.tables["results"][1][-1] == pct(run.rounds[2]["global"]["accuracy"])


def test_a_summary_full_of_nulls_is_reported_with_dashes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=0)
    keys = json.loads((folder / "summary.json").read_text())
    edit_summary(folder, **dict.fromkeys(keys) | {"method": "coop_local"})
    rewrite(folder / "metrics.jsonl", lambda x: {"kind": "round", "round": 0})
    (folder / "partition.json").unlink()
    page = report(folder)
    assert page.tables["results"] == [
        ["", "coop_local"],
        *([name, "-"] for name in ("Global", "Personalised", "Worst client", "10th percentile")),
        ["Personal on global test", "-"],
    ]
    assert "None" not in page.text
    assert page.figures == {}
    assert "clients" not in page.tables
    assert client_rows(load_run(folder), {}) == []


def test_the_page_draws_what_the_pictures_show(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", clients=3, untested=(1,))
    figures = run_figures(load_run(folder))
    described = report(folder).figures
    assert list(described) == [figure.name for figure in figures]
    for figure in figures:
        assert described[figure.name] == json.loads(json.dumps(figure.spec()))
        assert (folder / "plots" / f"{figure.name}.png").is_file()


def test_a_damaged_run_leaves_no_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json, line 1"):
        draw_report(folder)
    assert not (folder / "report.html").exists()
