"""Runs with protocols: results, figures and reports, also after a resume or from damaged files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import MetricRecord, RecordDict
from PIL import Image

from fedprompt.errors import UserError
from fedprompt.evaluation.registry import open_protocols, protocol_class, result_tables
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import resume, run
from fedprompt.experiment.summary import draw_report
from fedprompt.federation.screening import evaluation_row
from fedprompt.messages import METRICS
from fedprompt.reports.draw import MARK
from fedprompt.reports.result_tables import protocol_tables
from tests.support.protocol_runs import (
    TOGETHER,
    WITH_RESULTS,
    config_of,
    models_of,
    silent,
    summary_of,
)


@pytest.mark.parametrize("name", WITH_RESULTS)
def test_every_protocol_runs_draws_and_is_reported(runs: Callable[..., Path], name: str) -> None:
    folder = runs(name)
    part = summary_of(folder)["protocols"]
    assert list(part) == [name]
    picture = folder / "plots" / f"protocol_{name}.png"
    with Image.open(picture) as image:
        assert image.size[0] == 840
        assert len(np.unique(np.asarray(image.convert("L")))) > 20, "not an empty page"
    html = (folder / "report.html").read_text()
    (table,) = result_tables(summary_of(folder), "here")
    assert table.rows
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert f'id="protocol_{name}"' in html
    assert f"<h2>{table.title}</h2>" in html
    assert table.markdown().splitlines()[-1].count("|") == len(table.columns) + 1
    assert len(protocol_tables([table], 80)) == 1


@pytest.mark.parametrize("name", [n for n in WITH_RESULTS if protocol_class(n).asks_clients])
def test_protocols_say_which_numbers_clients_report(runs: Callable[..., Any], name: str) -> None:
    workspace, shared, private = models_of(runs(name))
    (protocol,) = [p for p in open_protocols(workspace.config) if p.name == name]
    clients = range(workspace.num_clients)
    rows = protocol.measure_clients(workspace, clients, [shared] * len(clients), private)
    ranges = protocol.client_numbers(workspace)
    for row in rows:
        assert set(row) == set(ranges)
        content = RecordDict({METRICS: MetricRecord({**row})})
        assert evaluation_row(content, ranges) == row


def test_default_runs_have_no_further_keys(runs: Callable[..., Path]) -> None:
    folder = runs()
    assert "protocols" not in summary_of(folder)
    assert '"protocols"' not in (folder / "metrics.jsonl").read_text()


def test_without_the_usual_two_nothing_of_theirs_is_measured(runs: Callable[..., Path]) -> None:
    folder = runs(protocols=["calibration"], evaluation={"local_only": True})
    summary = summary_of(folder)
    assert summary["personal"] is summary["local_only"] is summary["personal_on_global"] is None
    assert summary["global"]["accuracy"] is None
    assert set(summary["protocols"]["calibration"]["models"]) == {
        "zero-shot", "global", "personal",
    }  # fmt: skip


def test_methods_without_a_global_model_are_reported(runs: Callable[..., Path]) -> None:
    needs_one = {"unlearning", "compression", "prompt_choice"}
    folder = runs(*(n for n in TOGETHER if n not in needs_one), method={"name": "coop_local"})
    part = summary_of(folder)["protocols"]
    assert set(part["ood"]["histogram"]) == {"zero-shot"}
    assert set(part["calibration"]["models"]) == {"zero-shot", "personal"}
    assert part["per_class"]["confusion_of"] == "zero-shot"
    assert part["base_to_new"]["rows"][1]["why"] == "the method has no global model"
    assert part["base_to_new"]["rows"][2]["new"] is not None


def test_a_run_that_ended_before_its_protocols_resumes_to_the_same(
    runs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("base_to_new", "calibration", "fairness")
    whole = runs(*names, evaluation={"local_only": True})
    config = config_of(*names, evaluation={"local_only": True})
    config = replace(config, output=replace(config.output, dir=str(tmp_path / "run")))

    def killed(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fedprompt.experiment.run.finish", killed)
        with pytest.raises(KeyboardInterrupt):
            run(config, QuietDisplay(silent()))
    folder = resume(tmp_path / "run", QuietDisplay(silent()))
    assert summary_of(folder)["protocols"] == summary_of(whole)["protocols"]
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("name", WITH_RESULTS)
def test_damaged_results_are_one_line(runs: Callable[..., Path], tmp_path: Path, name: str) -> None:
    source, folder = runs(name), tmp_path / "run"
    folder.mkdir()
    for file in ("config.yaml", "metrics.jsonl", "partition.json"):
        os.link(source / file, folder / file)
    summary = summary_of(source)
    for broken in ({}, {"rows": [3]}, {"models": 1, "curves": 2, "accuracy": []}):
        summary["protocols"] = {name: broken}
        (folder / "summary.json").write_text(json.dumps(summary))
        with pytest.raises(UserError, match=rf"summary\.json is damaged: 'protocols\.{name}'"):
            draw_report(folder)


def test_results_of_another_version_are_left_out(runs: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for file in ("config.yaml", "metrics.jsonl", "partition.json"):
        os.link(runs() / file, folder / file)
    summary = summary_of(runs()) | {"protocols": {"of_another_version": {}}}
    (folder / "summary.json").write_text(json.dumps(summary))
    draw_report(folder)
    assert "of_another_version" not in (folder / "report.html").read_text()


def test_figures_of_protocols_that_are_gone_do_not_stay(
    runs: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    (folder / "plots").mkdir(parents=True)
    for file in ("config.yaml", "metrics.jsonl", "summary.json"):
        os.link(runs() / file, folder / file)
    (folder / "plots" / "protocol_ood.png").write_bytes(b"PNG " + MARK + b" pixels")
    draw_report(folder)
    assert not (folder / "plots" / "protocol_ood.png").exists()
