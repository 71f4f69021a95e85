"""The report holds the summary's numbers, needs no other file and trusts no text of the run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedprompt.data.partition import dense
from fedprompt.errors import UserError
from fedprompt.evaluation.protocols.communication import Communication
from fedprompt.experiment.summary import draw_report
from fedprompt.files import asset
from fedprompt.reports.client_figures import MANY
from fedprompt.reports.run_data import accuracy_of, load_run
from fedprompt.reports.run_report import client_rows, summary_of, write_report
from tests.reports.test_figures import rewrite, write_run


class Page(HTMLParser):
    """The tags, attributes and table cells of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self.scripts: list[tuple[list[tuple[str, str | None]], str]] = []
        self._rows: list[list[str]] | None = None
        self._cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append((attrs, ""))
        if tag == "table":
            name = (dict(attrs)["class"] or "").removesuffix(" sortable")
            self._rows = self.tables[name] = []
        elif tag == "tr" and self._rows is not None:
            self._rows.append([])
        elif tag in ("td", "th") and self._rows is not None:
            self._rows[-1].append("")
            self._cell = True

    @property
    def charts(self) -> dict[str, Any]:
        """The charts' data by name."""
        found: dict[str, Any] = json.loads(self.scripts[0][1])
        return found

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = attributes, before + data
            return
        text = data.replace("\N{NO-BREAK SPACE}", " ")
        self.text += text
        if self._cell and self._rows is not None:
            self._rows[-1][-1] += text


def report(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def edit_summary(folder: Path, **changes: Any) -> None:
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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
    expected = []
    for k in range(3):
        train, test = (dense(run.partition[part], 4)[k] for part in ("train_counts", "test_counts"))
        held = sum(count > 0 for count in train)
        accuracy = ["-", "-"] if k == 1 else [pct(own[k]), pct(before[k])]
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


def only_our_script_runs(html: str) -> None:
    """Two scripts: the charts' data, and the page's own, the only one that its policy allows."""
    page = Page(html)
    (data, content), (own, script) = page.scripts
    assert data == [("type", "application/json"), ("id", "charts")]
    assert not {"<", ">", "&"} & set(content)
    assert own == []
    assert script == asset("reports/assets/charts.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(v for k, v in page.attributes if k == "content" and "default-src" in str(v))
    assert policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )


def needs_nothing_else(html: str, pictures: int = 0) -> None:
    page = Page(html)
    only_our_script_runs(html)
    assert not {"link", "iframe", "object", "a", "embed", "form", "base"} & set(page.tags)
    sources = [value or "" for name, value in page.attributes if name in ("src", "href", "srcset")]
    assert len(sources) == pictures
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert "url(" not in html
    assert "@import" not in html
    assert "//" not in re.sub(r"base64,[^\"]+", "", html)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    for word in ("fetch", "XMLHttpRequest", "WebSocket", "import(", "eval", "innerHTML"):
        allowed = 1 if word == "innerHTML" else 0  # of a constant, to learn SVG's namespace
        assert page.scripts[1][1].count(word) == allowed, word


def test_the_file_needs_nothing_else(tmp_path: Path) -> None:
    needs_nothing_else(write_report(write_run(tmp_path / "run")).read_text(encoding="utf-8"))


def test_a_protocol_brings_its_figure_as_a_picture(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    points = [{"round": r, "accuracy": 0.4 + 0.1 * r, "up": 9 * r, "down": 9 * r} for r in range(3)]
    found = {"points": points, "reached": [{"percent": 90.0, **points[2]}]}
    edit_summary(folder, protocols={Communication.name: {"curves": {"global": found}}})
    html = draw_report(folder).read_text(encoding="utf-8")
    needs_nothing_else(html, pictures=1)
    assert Communication.title in Page(html).text


def test_text_of_the_run_is_escaped_everywhere(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    folder = write_run(tmp_path / "<b>run", classes=2, names=[evil, "beach"])
    edit_summary(
        folder,
        experiment=evil, method=evil, data=evil, strategy=evil, backbone=evil,
        environment={evil: evil}, shared={evil: [1]}, clients=evil, classes=evil, seed=evil,
    )  # fmt: skip
    with (folder / "config.yaml").open("a") as file:
        file.write(f"note: {json.dumps(evil)}\n")
    html = write_report(folder).read_text(encoding="utf-8")
    only_our_script_runs(html)
    page = Page(html)
    assert not {"b", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 9
    assert page.charts["partition"]["rows"] == [evil, "beach"]


def test_charts_hold_the_measured_numbers(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", clients=3, untested=(1,))
    run, charts = load_run(folder), report(folder).charts
    assert run.summary is not None
    assert set(charts) == {"accuracy_per_round", "client_accuracy", "loss_per_round", "partition"}
    curves = {one["name"]: one for one in charts["accuracy_per_round"]["series"]}
    assert curves["Global"]["y"] == [line["global"]["accuracy"] for line in run.rounds]
    own = curves["Personalised"]
    assert own["x"] == [0, 1, 2]
    for line, mean, low, high in zip(run.rounds, own["y"], own["low"], own["high"], strict=True):
        assert mean == line["personal"]["mean"]
        assert (low, high) == pytest.approx(
            (mean - line["personal"]["std"], mean + line["personal"]["std"])
        )
    assert curves["Local-only"]["y"] == [line["personal"]["mean"] for line in run.local_only]
    assert curves["Zero-shot"]["y"] == [run.summary["zero_shot"]["accuracy"]]
    losses = {one["name"]: one for one in charts["loss_per_round"]["series"]}
    assert losses["Training"]["x"] == [1, 2]  # round 0 trains nobody
    accuracy = accuracy_of(run.last("personal"))
    assert charts["client_accuracy"]["values"] == [accuracy[0], None, accuracy[2]]
    assert run.partition is not None
    counts_KC = dense(run.partition["train_counts"], 4)
    cells = [[count or 0 for count in row] for row in charts["partition"]["cells"]]
    assert cells == counts_KC.T.tolist()


def test_charts_of_many_clients_are_histograms(tmp_path: Path) -> None:
    charts = report(write_run(tmp_path / "run", clients=MANY + 50)).charts
    for name in ("client_accuracy", "partition", "classes_held"):
        assert sum(charts[name]["values"]) == MANY + 50
        assert len(charts[name]["labels"]) == len(charts[name]["values"]) <= 41


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
    assert "This run is not finished: 3 of 3 rounds are done." in page.text
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
    assert page.charts == {}
    assert "clients" not in page.tables
    assert client_rows(load_run(folder), {}) == []


def test_a_damaged_run_leaves_no_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json, line 1"):
        write_report(folder)
    assert not (folder / "report.html").exists()
