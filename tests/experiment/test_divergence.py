"""Clients whose training diverges: said once when it happens, and marked in every result."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fedprompt.federation.client_app as client_app
from fedprompt.cli.compare import print_tables, tables_of
from fedprompt.errors import StopRun
from fedprompt.experiment.display import PlainDisplay, QuietDisplay
from fedprompt.experiment.run import resume, run
from fedprompt.experiment.summary import draw_report
from fedprompt.federation.server_app import Federation
from fedprompt.reports.compare.load import load_rows
from fedprompt.reports.compare.metrics import choose
from fedprompt.reports.marks import mark_line, marks
from fedprompt.reports.run_data import accuracy_of
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.training import LocalResult
from fedprompt.workspace import Workspace
from tests.support.builders import small_config

CLIENTS, ROUNDS, FIRST = 3, 5, 2
CONFIG = small_config(
    data={"images_per_class": 4, "domains": ["savanna"]},
    partition={"clients": CLIENTS, "scheme": "iid"},
    federation={"rounds": ROUNDS},
    evaluation={"local_only": True},
)
train_clients = client_app.train_clients


def diverging(method: str, client: int) -> Callable[..., list[LocalResult]]:
    """Training after which one client's tensors are NaN from round `FIRST` on."""

    def spoilt(result: LocalResult) -> LocalResult:
        nan = {n: torch.full_like(t, torch.nan) for n, t in result.private.items()}
        shared = {n: torch.full_like(t, torch.nan) for n, t in result.shared.items()}
        losses = dict.fromkeys(result.losses, float("nan"))
        return replace(result, shared=shared, private=nan, losses=losses)

    def train(trained: Any, *arguments: Any, **settings: Any) -> list[LocalResult]:
        results = train_clients(trained, *arguments, **settings)
        if trained.name != method or settings["server_round"] < FIRST:
            return results
        return [spoilt(r) if r.client == client else r for r in results]

    return train


class StopAt(QuietDisplay):
    def round(self, record: Any, eta_s: float | None) -> None:
        if record["round"] == FIRST + 1:
            raise StopRun


def run_diverging(folder: Path, patch: pytest.MonkeyPatch, method: str = "fedrsclip") -> Path:
    patch.setattr(client_app, "train_clients", diverging(method, client=1))
    return run(replace(CONFIG, output=replace(CONFIG.output, dir=str(folder))), QuietDisplay())


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


@pytest.fixture(scope="module")
def diverged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        return run_diverging(tmp_path_factory.mktemp("diverged") / "run", patch)


def test_the_summary_names_the_client_and_its_round(diverged: Path) -> None:
    summary = summary_of(diverged)
    (mark,) = summary["marks"]
    assert mark["client"] == 1
    assert mark["diverged_in_round"] == FIRST
    assert (mark["dropped"], mark["asked"]) == (ROUNDS - FIRST + 1, ROUNDS)
    line = mark_line(summary)
    assert line is not None
    assert f"client 1 diverged in round {FIRST}; 4 of 5 updates dropped" in line


def test_a_model_that_is_not_finite_has_no_accuracy_of_class_0(diverged: Path) -> None:
    for part in (summary_of(diverged)["personal"], summary_of(diverged)["personal_on_global"]):
        assert part["not_finite"] == [1]
        accuracy = accuracy_of(part)
        assert accuracy[1] == 0.0
        assert part["mean"] == pytest.approx(sum(accuracy.values()) / CLIENTS)
        assert accuracy[0] > 0


def test_repeated_warnings_are_one_line_and_a_count(
    diverged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also over an interruption, after which the run is as the unbroken one."""
    monkeypatch.setattr(client_app, "train_clients", diverging("fedrsclip", client=1))
    config = replace(CONFIG, output=replace(CONFIG.output, dir=str(tmp_path / "run")))
    with caplog.at_level(logging.WARNING, "fedprompt"):
        run(config, StopAt())
        (first,) = [r.message for r in caplog.records if "client 1" in r.message]
        assert "not finite" in first
        caplog.clear()
        with (tmp_path / "out.txt").open("w") as out:
            resume(tmp_path / "run", PlainDisplay(Console(file=out)))
    (last,) = [r.message for r in caplog.records if "client 1" in r.message]
    assert "3 more times" in last
    text = (tmp_path / "out.txt").read_text()
    assert "so far: client 1 diverged in round 2; 2 of 3 updates dropped" in text
    assert "client 1 diverged in round 2; 4 of 5 updates dropped" in text
    for name in ("marks", "personal", "global", "local_only"):
        assert summary_of(tmp_path / "run")[name] == summary_of(diverged)[name]


def test_report_and_comparison_are_marked(diverged: Path) -> None:
    page = draw_report(diverged).read_text()
    assert page.count("lient 1 diverged in round 2; 4 of 5 updates dropped") == 1
    assert "†" in page
    rows = load_rows([diverged]).rows
    (table,) = tables_of(rows, choose(None, rows))
    assert "fedrsclip, seed 1: client 1 diverged in round 2; 4 of 5 updates dropped" in table.note
    console = Console(width=100, record=True)
    print_tables([table], console)
    assert "client 1 diverged" in " ".join(console.export_text().split())


def test_a_diverged_baseline_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_diverging(tmp_path / "run", monkeypatch, "coop_local")
    summary = summary_of(folder)
    assert "marks" not in summary, "the run itself is sound"
    assert '"diverged"' not in (folder / "metrics.jsonl").read_text().partition("local_only")[0]
    assert summary["personal"].get("not_finite") is None
    assert summary["local_only"]["personal"]["not_finite"] == [1]
    assert accuracy_of(summary["local_only"]["personal"])[1] == 0.0
    assert "local-only model of client 1 is not finite" in str(mark_line(summary))


def test_a_method_without_shared_prompts_is_marked_by_its_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(
        data={"images_per_class": 4, "domains": ["savanna"]},
        partition={"clients": CLIENTS, "scheme": "iid"},
        method={"name": "coop_local"},
        output={"report": False, "dir": str(tmp_path / "run")},
    )
    monkeypatch.setattr(client_app, "train_clients", diverging("coop_local", client=2))
    summary = summary_of(run(config, QuietDisplay()))
    (mark,) = summary["marks"]
    assert (mark["client"], mark["diverged_in_round"], mark["dropped"]) == (2, FIRST, 0)
    assert summary["personal"]["not_finite"] == [2]


def lines(rounds: int, dropped: int, reason: str = "no reply") -> list[dict[str, Any]]:
    """Rounds in which client 3 is dropped in the last `dropped` ones."""
    return [
        {
            "round": r,
            "clients": {"sampled": 4},
            **({"dropped": {"3": f"{reason} {r}"}} if r > rounds - dropped else {}),
        }
        for r in range(1, rounds + 1)
    ]


@pytest.mark.parametrize(("dropped", "marked"), [(0, False), (1, False), (2, True)])
def test_more_than_a_tenth_of_the_updates_is_marked(dropped: int, marked: bool) -> None:
    found = marks(lines(10, dropped))
    assert [m["client"] for m in found] == [3] * marked
    if marked:
        # The first of the reasons, which differ in their numbers only.
        assert found[0]["reason"] == "no reply 9"
        assert "client 3: 2 of 10 updates dropped (no reply 9)" in str(mark_line({"marks": found}))


def test_the_tenth_is_one_of_the_rounds_in_which_a_client_was_asked() -> None:
    assert marks(lines(30, 2)) == []
    (mark,) = marks(lines(30, 2), asked={3: 6})
    assert (mark["dropped"], mark["asked"]) == (2, 6)


def test_many_clients_are_one_line() -> None:
    everyone = {str(client): "'ctx' is not finite" for client in range(20)}
    line = {"round": 4, "clients": {"sampled": 20}, "dropped": everyone, "diverged": everyone}
    text = str(mark_line({"marks": marks([line])}))
    assert "clients 0, 1, 2, 3, 4, 5, 6, 7 and 12 more diverged in round 4" in text
    assert "20 of 20 updates dropped" in text


def test_a_resumed_server_knows_how_often_clients_were_asked(
    make_workspace: Callable[..., Workspace],
) -> None:
    def federation() -> Federation:
        workspace = make_workspace(method={"name": "coop_local"}, federation={"fraction": 0.5})
        new = Federation(workspace, InlineGrid(workspace))
        new.join()
        return new

    whole, resumed = federation(), federation()
    for server_round in (1, 2, 3):
        whole.train_round(server_round)
    assert whole.asked.total() == 6
    resumed.restore(whole.checkpoint(3, {"rejected": 0}))
    assert resumed.asked == whole.asked
