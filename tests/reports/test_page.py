"""A report's page needs no other file, runs only its own script and trusts no text of a run."""

from __future__ import annotations

import json
from pathlib import Path

from fedprompt.evaluation.protocols.communication import Communication
from fedprompt.experiment.summary import draw_report
from fedprompt.reports.run_data import load_run
from fedprompt.reports.run_report import write_report
from fedprompt.reports.sweep_report import write_sweep_report
from tests.support.fake_runs import edit_summary, write_run, write_sweep
from tests.support.pages import Page, needs_nothing_else, only_our_script_runs


def test_the_pages_need_nothing_else(tmp_path: Path) -> None:
    run = write_report(load_run(write_run(tmp_path / "run")))
    runs = write_sweep(tmp_path / "sweep", alphas=(0.1,))
    for page in (run, write_sweep_report(runs, tmp_path / "sweep.html")):
        needs_nothing_else(page.read_text(encoding="utf-8"))


def test_a_protocol_brings_its_figure_to_the_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    points = [{"round": r, "accuracy": 0.4 + 0.1 * r, "up": 9 * r, "down": 9 * r} for r in range(3)]
    curve = {"points": points, "reached": [{"percent": 90.0, **points[2]}]}
    edit_summary(folder, protocols={Communication.name: {"curves": {"global": curve}}})
    html = draw_report(folder).read_text(encoding="utf-8")
    needs_nothing_else(html)
    assert Communication.title in Page(html).text
    assert f"protocol_{Communication.name}" in Page(html).figures
    assert (folder / "plots" / f"protocol_{Communication.name}.png").is_file()


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
    html = write_report(load_run(folder)).read_text(encoding="utf-8")
    only_our_script_runs(html)
    page = Page(html)
    assert not {"b", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 9
    assert page.figures["partition"][1]["rows"] == [evil, "beach"]
