"""A search: equal budgets, no test image, and the same trials after an interruption."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedprompt.cli.main import main
from fedprompt.config.search import Choices, log_range
from fedprompt.data.dataset import TEST
from fedprompt.errors import UserError
from fedprompt.experiment.logs import Logs
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.reports.figure import Bars, Lines
from fedprompt.reports.run_data import CHECKPOINT, SUMMARY
from fedprompt.sweeps.plan import expand, load_sweep
from fedprompt.tuning import search as module
from fedprompt.tuning.plan import Budget, TunePlan, make_plan
from fedprompt.tuning.proposals import Trial
from fedprompt.tuning.results import TRIALS_TABLE, TUNED, figures, write_results
from fedprompt.tuning.search import RowResult, search, trial_config

SMALL = [
    "data.images_per_class=12", "data.domains=[savanna]", "partition.clients=2",
    "partition.alpha=1", "federation.rounds=2", "simulation.threads=1",
]  # fmt: skip
BUDGET = Budget(trials=3, batch=2, sampler="random")


@pytest.fixture(scope="module")
def plan() -> TunePlan:
    return make_plan("label_skew", SMALL, BUDGET, methods=["promptfl", "zero_shot", "fedrsclip"])


@pytest.fixture(scope="module")
def searched(plan: TunePlan, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("search") / "out"
    results = search(plan, folder, serial=True, quiet=True)
    write_results(plan, results, folder)
    return folder, results


def test_every_row_gets_the_same_budget(searched: tuple[Path, list[RowResult]]) -> None:
    folder, results = searched
    assert [len(r.trials) for r in results] == [3, 0, 3]  # nothing can be tuned in zero-shot CLIP
    assert [r.best is not None for r in results] == [True, False, True]
    runs = sorted(path.name for path in (folder / "trials").iterdir())
    assert len(runs) == 6
    with (folder / "trials.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert [row["row"] for row in table] == ["promptfl"] * 3 + ["fedrsclip"] * 3
    # The first trial has the row's own settings.
    assert table[0]["training.lr"] == table[3]["training.lr"] == "0.02"


def test_an_interrupted_search_ends_with_the_same_trials(
    plan: TunePlan,
    searched: tuple[Path, list[RowResult]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, results = searched
    # The search was killed: some trials are complete, one was never begun.
    shutil.copytree(folder, tmp_path / "out")
    gone = sorted((tmp_path / "out" / "trials").iterdir())[-2:]
    for path in gone:
        shutil.rmtree(path)
    again = tmp_path / "out"
    save = Logs.save

    def killed(logs: Logs, federation: Any, server_round: int, *arguments: Any) -> None:
        save(logs, federation, server_round, *arguments)
        if server_round == 1:
            raise Killed

    # The process ends in the middle of a trial, which has a checkpoint.
    monkeypatch.setattr(Logs, "save", killed)
    with pytest.raises(Killed):
        search(plan, again, serial=True, quiet=True)
    monkeypatch.setattr(Logs, "save", save)
    (begun,) = (p for p in (again / "trials").iterdir() if not (p / SUMMARY).exists())
    assert (begun / CHECKPOINT).exists()
    planned: list[str] = []
    whole = module.run_planned

    def run_planned(table: Any, runs: Any, *args: Any, **kwargs: Any) -> dict[str, str]:
        planned.extend(run.name for run in runs)
        return whole(table, runs, *args, **kwargs)

    monkeypatch.setattr(module, "run_planned", run_planned)
    # The run folders carry the new place; everything else is what it was.
    repeated = search(plan, again, serial=True, quiet=True)
    assert [r.trials for r in repeated] == [r.trials for r in results]
    assert [r.best for r in repeated] == [r.best for r in results]
    assert sorted(planned) == sorted(path.name for path in (folder / "trials").iterdir())


class Killed(BaseException):
    """Ends a search as no error of a run does."""


@pytest.mark.slow
def test_a_killed_search_goes_on_with_several_workers(
    plan: TunePlan, searched: tuple[Path, list[RowResult]], tmp_path: Path
) -> None:
    """After `kill -9` in a trial, Ray's workers complete what one process would have done."""
    folder, _ = searched
    command = [sys.executable, "-m", "fedprompt", "tune", "label_skew", *SMALL]
    command += ["--methods", "promptfl,zero_shot,fedrsclip", "--trials", "3", "--batch", "2"]
    command += ["--sampler", "random", "--out", str(tmp_path / "out")]
    process = subprocess.Popen([*command, "--serial"], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not [*tmp_path.glob(f"out/trials/*/{CHECKPOINT}")]:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    results = search(plan, tmp_path / "out", jobs=2, quiet=True)
    write_results(plan, results, tmp_path / "out")
    ours, theirs = (yaml.safe_load((f / TUNED).read_text()) for f in (tmp_path / "out", folder))
    # Each search gives its sweep a name, and with it a folder, of its own.
    assert (ours.pop("name"), theirs.pop("name")) == ("out-tuned", f"{folder.name}-tuned")
    assert ours == theirs
    tables = [(f / TRIALS_TABLE).read_bytes() for f in (tmp_path / "out", folder)]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("kind", ["steps", "seconds"])
def test_a_budget_of_another_kind_is_equal_within_a_batch(
    kind: str, plan: TunePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method whose trials cost less gets more of them; no run is done here."""
    cost = {"promptfl": 20, "fedrsclip": 45}
    budget = replace(BUDGET, **{kind: 100})
    monkeypatch.setattr(module, "run_planned", lambda *_, **__: {})
    monkeypatch.setattr(
        module,
        "_read",
        lambda run, failed: Trial(run.values, 0.5, **{kind: cost[run.row]}),
    )
    results = search(replace(plan, budget=budget), tmp_path / "out", serial=True)
    for result in results:
        if result.row.space:
            spent = sum(getattr(trial, kind) for trial in result.trials)
            assert 100 <= spent < 100 + budget.batch * cost[result.row.name]
    assert str(budget).startswith(f"100 {'client steps' if kind == 'steps' else 'seconds'} by")
    # Another kind of budget is another search.
    with pytest.raises(UserError, match="'budget' differs"):
        search(plan, tmp_path / "out")


def test_what_trials_have_cost_is_read_from_their_runs(
    searched: tuple[Path, list[RowResult]],
) -> None:
    folder, results = searched
    summaries = [json.loads(p.read_text()) for p in (folder / "trials").glob(f"*/{SUMMARY}")]
    trials = [trial for result in results for trial in result.trials]
    assert sorted(t.steps for t in trials) == sorted(s["client_steps"] for s in summaries)
    assert sum(t.seconds for t in trials) == pytest.approx(
        sum(s["seconds"] for s in summaries), abs=0.01
    )


def test_a_trial_cannot_see_test_images(plan: TunePlan) -> None:
    config = trial_config(plan, plan.rows[0], {})
    whole = open_workspace(make_plain(plan))
    tests = np.concatenate((whole.partition.test_flat, whole.partition.server_test))
    assert len(tests) > 20
    assert len(whole.partition.validation_flat) > 0
    workspace = open_workspace(config)
    assert not len(workspace.partition.test_flat)
    assert not len(workspace.partition.server_test)
    held = workspace.partition.held(len(workspace.dataset))
    assert not held[tests].any()
    assert (workspace.dataset.labels_N[tests] == -1).all()
    assert (whole.dataset.split_N[whole.partition.server_test] == TEST).all()
    for image in (int(tests[0]), int(tests[-1])):
        with pytest.raises(ValueError, match="withheld"):
            workspace.dataset.open_image(image)
        with pytest.raises(ValueError, match="withheld"):
            workspace.views[0].rows(np.array([image]))
    # What a trial trains and chooses on is what the run after the search has.
    assert np.array_equal(workspace.partition.train_flat, whole.partition.train_flat)
    assert np.array_equal(workspace.partition.validation_flat, whole.partition.validation_flat)
    assert np.array_equal(workspace.partition.server_validation, whole.partition.server_validation)


def make_plain(plan: TunePlan) -> Any:
    """The config of a run after the search."""
    from fedprompt.experiment.compose import compose

    return compose(plan.experiment, [*plan.common, *plan.rows[0].overrides])


def test_the_tuned_sweep_has_the_winners_settings(
    plan: TunePlan, searched: tuple[Path, list[RowResult]], tmp_path: Path
) -> None:
    folder, results = searched
    sweep = load_sweep(folder / TUNED)
    assert sweep.name == f"{folder.name}-tuned"
    runs = expand(sweep, tmp_path)
    assert [(run.row, run.seed) for run in runs][:4] == [
        ("promptfl", 1), ("promptfl", 2), ("promptfl", 3), ("zero_shot", 1)
    ]  # fmt: skip
    first = results[0]
    assert first.best is not None
    assert runs[0].config.training.lr == first.trials[first.best].values["training.lr"]
    for run in runs:
        settings = run.config.evaluation
        assert not settings.withhold_tests
        assert settings.select == "best_validation"
        assert bool(settings.chosen_by) == (run.row != "zero_shot")
        assert run.config.partition.local_validation_fraction == 0.2
    assert (folder / "history.png").stat().st_size > 1000
    assert len(list((folder / "configs").iterdir())) == 3


def test_the_seed_of_the_trials_is_not_that_of_the_tuned_sweep(tmp_path: Path) -> None:
    plan = make_plan("label_skew", [*SMALL, "seed=11"], BUDGET, methods=["promptfl"])
    assert plan.seed == 11
    trial = trial_config(plan, plan.rows[0], {})
    assert trial.seed == 11
    write_results(plan, [RowResult(plan.rows[0], (), None, {})], tmp_path)
    runs = expand(load_sweep(tmp_path / TUNED), tmp_path)
    assert [run.seed for run in runs] == [1, 2, 3]


def test_options_of_a_wrapped_method_are_searched(tmp_path: Path) -> None:
    """From the space to a trial, and from the winner to the tuned sweep."""
    key = "method.options.kg_weight"
    table = {"experiment": "label_skew", "common": SMALL, "seeds": [1]}
    rows = {"A b": ["method=ditto", "method.base=kgcoop"], "a-B": ["method=promptfl"]}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table | {"rows": rows}))
    plan = make_plan(str(tmp_path / "table.yaml"), [], BUDGET)
    row, other = plan.rows
    assert {*row.space} == {"training.lr", "method.lam", key}
    assert trial_config(plan, row, {key: 3.0}).method.base_config().kg_weight == 3.0
    values = [{"training.lr": 0.1 / n, "method.lam": 1.0, key: 2.0 * n} for n in range(1, 5)]
    trials = tuple(Trial(v, 0.5 + n / 10) for n, v in enumerate(values))
    (tmp_path / "out").mkdir()
    write_results(
        plan, [RowResult(row, trials, 3, {}), RowResult(other, (), None, {})], tmp_path / "out"
    )
    runs = expand(load_sweep(tmp_path / "out" / TUNED), tmp_path / "runs")
    assert runs[0].config.method.options["kg_weight"] == 8.0
    assert runs[0].config.training.lr == 0.025
    # Rows whose names differ in capitals and hyphens only keep files of their own.
    assert len(list((tmp_path / "out" / "configs").iterdir())) == 2


def test_the_figures_show_every_setting_and_its_importance(plan: TunePlan) -> None:
    space = {"training.lr": log_range(0.001, 1), "method.context_tokens": Choices((4, 16))}
    row = replace(plan.rows[0], space=space)
    # 8 tokens are not among the choices, as the settings of a row itself may be.
    trials = tuple(
        Trial({"training.lr": 0.5 / (n + 1), "method.context_tokens": tokens}, n / 10)
        for n, tokens in enumerate((8, 4, 16, 4, 16))
    )
    _, tried = figures(plan, [RowResult(row, trials, 3, {})])
    lr, tokens, importance = tried.panels
    assert isinstance(lr, Lines)
    assert lr.x.log
    assert isinstance(tokens, Lines)
    assert tokens.x.names == ["4", "16", "8"]
    assert [*tokens.curves[0].x] == [0, 0, 1, 1, 2]
    assert isinstance(importance, Bars)
    assert {*importance.labels} == {"lr", "context_tokens"}
    shares = [value or 0 for value in importance.series[0].values]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)
    _, few = figures(plan, [RowResult(row, trials[:4], 3, {})])
    assert len(few.panels) == 2


def test_bad_input_is_refused_before_anything_runs(
    plan: TunePlan, searched: tuple[Path, list[RowResult]], tmp_path: Path
) -> None:
    folder, _ = searched
    other = make_plan("label_skew", SMALL, Budget(trials=4), methods=["promptfl"])
    with pytest.raises(UserError, match="another search"):
        search(other, folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds no search"):
        search(plan, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    space = tmp_path / "space.yaml"
    for text, problem in (
        ("method.nothing: [1, 2]", "method.nothing"),
        ("method.context_tokens: [4, 0]", "method.context_tokens"),
        ("training.lr: 3", "training.lr"),
    ):
        space.write_text(text)
        with pytest.raises(UserError, match=problem):
            make_plan("label_skew", SMALL, BUDGET, methods=["promptfl"], spaces=space)
    with pytest.raises(UserError, match="local_validation_fraction"):
        make_plan("label_skew", [*SMALL, "partition.local_validation_fraction=0.9"], BUDGET)
    with pytest.raises(UserError, match="settings to search"):
        make_plan("label_skew", SMALL, BUDGET, methods=["zero_shot"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--sampler", "best"],
        ["--prune", "half"],
        ["--objective", "test"],
        ["--budget-steps", "100", "--trials", "3"],
        ["--seeds", "1,x"],
    ],
)
def test_an_unknown_word_is_named(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["fedprompt", "tune", "label_skew", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err
