"""`fedprompt leaderboard`: what it prints and writes, exit statuses, and refusals."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedprompt.cli.main import app
from fedprompt.errors import RunFailed, UserError
from fedprompt.leaderboard import output
from fedprompt.reports.figure import Figure
from fedprompt.suites.result_file import ResultFile, read, write
from tests.support.result_files import result_file

ROWS = {"PromptFL": 0.6, "FedRSCLIP": 0.7, "CoOp|local": 0.65, "<b>zero</b>": 0.5}
SEEDS = (1, 2, 3)


def made_up(level: float, seed: int) -> dict[str, dict[int, float]]:
    """Accuracies near `level` in two scenarios."""
    noise = np.random.default_rng(seed).normal(scale=0.01, size=(2, 3))
    return {
        name: {seed: float(level + noise[i, k]) for k, seed in enumerate(SEEDS)}
        for i, name in enumerate(("label-skew", "few-shot"))
    }


def row(name: str, level: float) -> ResultFile:
    return result_file(name, made_up(level, 1), made_up(level + 0.05, 2))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the figures, which take long to draw and are not drawn here."""
    names: list[str] = []

    def save_all(figures: Sequence[Figure], folder: Path) -> list[Path]:
        names.extend(figure.name for figure in figures)
        return []

    monkeypatch.setattr(output, "save_all", save_all)
    return names


@pytest.fixture
def board(tmp_path: Path, drawn: list[str]) -> Path:
    """The folder of a suite with four rows."""
    del drawn
    for i, (name, level) in enumerate(ROWS.items()):
        write(row(name, level), tmp_path / "suite" / "results" / f"{i}.json")
    return tmp_path / "suite"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["leaderboard", *map(str, arguments)])


def test_prints_and_writes_both_settings(board: Path, tmp_path: Path, drawn: list[str]) -> None:
    done = invoke(board, "--out", tmp_path / "out")
    assert done.exit_code == 0
    text = (tmp_path / "out" / "leaderboard.md").read_text()
    assert done.stdout == text
    heads = next(line for line in text.splitlines() if "tuned score" in line)
    assert "default score" in heads
    assert [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| F")] == [
        "| FedRSCLIP"
    ] * 3
    assert "12 trials by tpe" in text
    assert "fedprompt 0.1.0, torch 2.9.0" in text
    assert "CoOp\\|local" in text
    assert "\\<b>" in text
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "leaderboard.md", "leaderboard.html", "leaderboard.csv", "leaderboard.json",
    }  # fmt: skip
    assert drawn == ["ranks-demo-v1-tuned", "ranks-demo-v1-default", "traffic-demo-v1"]


def test_the_page_is_offline_and_escapes_names(board: Path, tmp_path: Path) -> None:
    invoke(board, "--out", tmp_path / "out")
    page = (tmp_path / "out" / "leaderboard.html").read_text()
    assert "<b>zero" not in page
    assert "&lt;b&gt;zero" in page
    for outside in ("http:", "https:", "<link", "src=", "@import", "url("):
        assert outside not in page, outside


def test_everything_can_be_computed_again_from_the_csv(board: Path, tmp_path: Path) -> None:
    invoke(board, "--out", tmp_path / "out")
    with (tmp_path / "out" / "leaderboard.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == len(ROWS) * 2 * 2 * 3
    stored = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    for setting, ranking in stored["suites"]["demo-v1"]["settings"].items():
        means: dict[str, Mapping[str, float]] = {}
        for name in ROWS:
            of_row = [x for x in lines if (x["row"], x["setting"]) == (name, setting)]
            means[name] = {
                scenario: float(
                    np.mean([float(x["value"]) for x in of_row if x["scenario"] == scenario])
                )
                for scenario in ("label-skew", "few-shot")
            }
            score = ranking["rows"][name]["score"]["mean"]
            assert score == pytest.approx(np.mean(list(means[name].values())), rel=1e-12)
        for name in ROWS:
            ranks = [
                1 + sum(means[other][scenario] > value for other in ROWS)
                for scenario, value in means[name].items()
            ]
            assert ranking["rows"][name]["average_rank"] == np.mean(ranks)


def test_the_order_of_the_files_changes_nothing(board: Path, tmp_path: Path) -> None:
    files = sorted((board / "results").iterdir())
    invoke(*files, "--out", tmp_path / "a")
    invoke(*files[::-1], "--out", tmp_path / "b")
    a, b = ((tmp_path / x / "leaderboard.md").read_text() for x in "ab")
    assert a == b


def test_one_setting_alone(board: Path, tmp_path: Path) -> None:
    done = invoke(board, "--settings", "default", "--out", tmp_path / "out")
    assert done.exit_code == 0
    assert "tuned score" not in done.stdout
    assert "12 trials" not in done.stdout


def test_refused_files_are_listed_and_the_rest_is_ranked(board: Path, tmp_path: Path) -> None:
    path = board / "results" / "0.json"
    path.write_text(path.read_text().replace("PromptFL", "PromptXX"))
    done = invoke(board, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "FedRSCLIP" in done.stdout
    for text in (
        done.stderr,
        *((tmp_path / "out" / f"leaderboard.{x}").read_text() for x in ("md", "html", "json")),
    ):
        assert "0.json" in text
        assert "checksum" in text


def test_incomplete_rows_and_divergence_are_told(board: Path, tmp_path: Path) -> None:
    bad, part = row("Bad", 0.3), row("Part", 0.6)
    scenario = bad.scenarios["few-shot"]
    assert scenario.tuned is not None
    seeds = dict(scenario.tuned.seeds)
    seeds[2] = replace(seeds[2], diverged="client 6 diverged in round 4")
    scenario = replace(scenario, tuned=replace(scenario.tuned, seeds=seeds))
    for result, scenarios in (
        (bad, {**bad.scenarios, "few-shot": scenario}),
        (part, {"few-shot": scenario}),
    ):
        path = board / "results" / f"{result.row}.json"
        write(replace(result, scenarios=scenarios), path)
    done = invoke(board, "--out", tmp_path / "out")
    assert done.exit_code == 0
    page = (tmp_path / "out" / "leaderboard.html").read_text()
    for text in (done.stdout, page):
        assert "Part, tuned settings: incomplete, without label-skew" in text
        for name in ("Bad", "Part"):
            assert f"{name}, few-shot, seed 2: client 6 diverged in round 4" in text
        assert "†" in text
    assert not any(line.startswith("| Part") for line in done.stdout.splitlines())


def test_metrics_stand_in_the_heads_where_they_differ(board: Path, tmp_path: Path) -> None:
    for path in (board / "results").iterdir():
        result = read(path)
        few = replace(result.scenarios["few-shot"], metric="harmonic")
        write(replace(result, scenarios={**result.scenarios, "few-shot": few}), path)
    done = invoke(board, "--out", tmp_path / "out")
    assert "|  | label-skew (personal) | few-shot (harmonic) |" in done.stdout
    done = invoke(board, "--metric", "worst", "--out", tmp_path / "out")
    assert "|  | label-skew | few-shot |" in done.stdout


def test_two_suites_have_a_section_each(board: Path, tmp_path: Path) -> None:
    for name in ("A", "B", "C"):
        result = result_file(name, {"x": {1: 0.5}, "y": {1: 0.6}}, suite="other-v1")
        write(result, board / "results" / f"{name}.json")
    done = invoke(board, "--out", tmp_path / "out")
    heads = [line for line in done.stdout.splitlines() if line.startswith("## ")]
    assert heads == ["## demo-v1", "## other-v1"]


def test_all_refused_is_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("{")
    done = invoke(path, "--out", tmp_path / "out")
    assert isinstance(done.exception, RunFailed)
    assert "a.json" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option", [("--settings", "best"), ("--metric", "f1"), ("--blocks", "x"), ("--by", "few-shots")]
)
def test_an_unknown_choice_is_refused(board: Path, tmp_path: Path, option: tuple[str, str]) -> None:
    done = invoke(board, *option, "--out", tmp_path / "out")
    assert isinstance(done.exception, UserError)
    assert option[0] in str(done.exception)
    assert option[1] in str(done.exception)


def test_files_of_the_user_are_not_replaced(board: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "leaderboard.csv").write_text("mine\n")
    done = invoke(board, "--out", tmp_path / "out")
    assert isinstance(done.exception, UserError)
    assert "leaderboard.csv" in str(done.exception)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["leaderboard.csv"]


def test_our_own_files_are_replaced(board: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert invoke(board, "--out", tmp_path / "out").exit_code == 0
