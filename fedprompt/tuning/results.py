"""What a search leaves: the tuned sweep, each row's winning config, all trials, and a page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedprompt.config.schema import to_yaml
from fedprompt.config.search import Choices
from fedprompt.errors import UserError
from fedprompt.experiment.compose import compose
from fedprompt.files import write_bytes
from fedprompt.reports.draw import save_all
from fedprompt.reports.figure import (
    Axis,
    Bars,
    BarSeries,
    Curve,
    Figure,
    Lines,
    Panel,
    palette,
)
from fedprompt.sweeps.plan import file_name
from fedprompt.tuning.plan import TunePlan
from fedprompt.tuning.proposals import importances
from fedprompt.tuning.search import RowResult

TUNED = "tuned.yaml"
"""The sweep of the winners, which `fedprompt sweep` takes."""
TRIALS_TABLE = "trials.csv"
CONFIGS = "configs"
"""The folder with the winner of each row as a complete config, which `fedprompt run` takes."""


def write_results(plan: TunePlan, results: Sequence[RowResult], folder: Path) -> None:
    """Write everything that a finished search leaves into its folder.

    Args:
        plan: the search.
        results: its results by row.
        folder: the folder of the search.

    Raises:
        UserError: a file cannot be written.
    """
    rows = {r.row.name: [*r.row.overrides, *chosen(plan, r)] for r in results}
    common = [*plan.common, "evaluation.select=best_validation"]
    sweep = {
        # The file's own name is the same for all searches, and each needs a folder of its own.
        "name": f"{folder.resolve().name}-tuned",
        "experiment": plan.experiment,
        "seeds": list(plan.seeds),
        "common": common,
        "rows": rows,
    }
    head = (
        f"# The best settings of each row: {plan.budget}.\n#   fedprompt sweep {folder / TUNED}\n"
    )
    files = {TUNED: head + yaml.safe_dump(sweep, sort_keys=False), TRIALS_TABLE: _table(results)}
    names = _names(plan)
    for result in results:
        config = compose(plan.experiment, [*common, *rows[result.row.name]])
        files[f"{CONFIGS}/{names[result.row.name]}.yaml"] = to_yaml(config)
    if all(_holds(folder / name, text) for name, text in files.items()):
        return
    # Before the files, whose presence says that nothing is missing.
    save_all(figures(plan, results), folder)
    try:
        (folder / CONFIGS).mkdir(exist_ok=True)
        for name, text in files.items():
            write_bytes(folder / name, text.encode())
    except OSError as error:
        raise UserError(f"tune: cannot write into {folder}: {error.strerror}.") from None


def chosen(plan: TunePlan, result: RowResult) -> list[str]:
    """The overrides of a row's best trial, with the search that chose them.

    Args:
        plan: the search.
        result: the row's result. Rows without trials keep their own settings.
    """
    if result.best is None:
        return []
    values = result.trials[result.best].values
    texts = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return [*texts, f"evaluation.chosen_by={json.dumps(str(plan.budget))}"]


def _holds(path: Path, text: str) -> bool:
    """Whether a file exists and has this content."""
    return path.is_file() and path.read_bytes() == text.encode()


def figures(plan: TunePlan, results: Sequence[RowResult]) -> list[Figure]:
    """What the trials tell: the best objective by number of trials, and every row's settings.

    Args:
        plan: the search.
        results: its results by row.

    Returns:
        The history, and for each row that was searched a figure of the objective over every setting
        that was tried, with the importance of the settings.
    """
    searched, names = [r for r in results if r.trials], _names(plan)
    accuracy = Axis(label=f"{plan.budget.objective} accuracy, validation", format="percent")
    history = Lines(
        curves=[_history(result, palette(i)) for i, result in enumerate(searched)],
        x=Axis(label="Trial", format="count"),
        y=accuracy,
    )
    made = [
        Figure(
            name="history",
            title="Best accuracy by number of trials",
            caption="A trial that was ended early does not count.",
            panels=(history,),
        )
    ]
    for i, result in enumerate(searched):
        panels: list[Panel] = [
            _tried(result, key, accuracy, palette(i)) for key in result.row.space
        ]
        caption = "One dot per trial, including those that were ended early."
        if shares := importances(result.row.space, result.trials):
            panels.append(_importance(shares, palette(i)))
            caption += (
                " Importance is the share of each setting in what separates the best third of the "
                "trials from the others (PED-ANOVA); those that were ended early do not count."
            )
        made.append(
            Figure(
                name=f"tried-{names[result.row.name]}",
                title=f"Settings of {result.row.name}",
                caption=caption,
                panels=tuple(panels),
            )
        )
    return made


def _importance(shares: Mapping[str, float], color: str) -> Bars:
    """The importance of each setting, largest first."""
    return Bars(
        # Whole keys would run into each other below the bars.
        labels=[key.rpartition(".")[2] for key in shares],
        series=[BarSeries("Importance", color, list(shares.values()))],
        x=Axis(),
        y=Axis(label="Importance", format="percent", low=0, high=1),
    )


def result_rows(results: Sequence[RowResult]) -> list[dict[str, Any]]:
    """What a terminal shows of each row.

    Returns:
        Per row: `trials`, `pruned`, `failed` and client `steps` are counts, `own` and `tuned` the
        objectives of the row's own settings and of the best ones, and `values` the best settings.
    """
    rows = []
    for result in results:
        best = None if result.best is None else result.trials[result.best]
        rows.append(
            {
                "row": result.row.name,
                "trials": len(result.trials),
                "pruned": sum(trial.pruned for trial in result.trials),
                "failed": len(result.failures),
                "steps": sum(trial.steps for trial in result.trials),
                "own": result.trials[0].objective if result.trials else None,
                "tuned": best.objective if best else None,
                "values": dict(best.values) if best else {},
            }
        )
    return rows


def _names(plan: TunePlan) -> dict[str, str]:
    """What the names of a row's files begin or end with, by row; no two are equal."""
    names: dict[str, str] = {}
    for row in plan.rows:
        stem = name = file_name(row.name) or "row"
        number = 2
        while name in names.values():
            name, number = f"{stem}-{number}", number + 1
        names[row.name] = name
    return names


def _history(result: RowResult, color: str) -> Curve:
    best: list[float] = []
    numbers: list[float] = []
    for number, trial in enumerate(result.trials):
        whole = [] if trial.objective is None or trial.pruned else [trial.objective]
        # Before the first whole trial there is no best one.
        if values := [*whole, *best[-1:]]:
            best.append(max(values))
            numbers.append(number)
    return Curve(name=result.row.name, color=color, x=numbers, y=best)


def _tried(result: RowResult, key: str, y: Axis, color: str) -> Lines:
    """The values of a setting that were tried, and what they led to."""
    space = result.row.space[key]
    done = [(t.values[key], t.objective) for t in result.trials if t.objective is not None]
    if isinstance(space, Choices):
        # A row's own settings may have a value that is not among the choices.
        names = list(dict.fromkeys([*space.values, *(value for value, _ in done)]))
        done = [(names.index(value), objective) for value, objective in done]
        x = Axis(label=key, names=[str(name) for name in names])
    else:
        x = Axis(label=key, log=space.log)
    points = sorted(done)
    values, accuracies = [p[0] for p in points], [p[1] for p in points]
    curve = Curve(name=key, color=color, x=values, y=accuracies, joined=False)
    return Lines(curves=[curve], x=x, y=y, nearest=True)


def _table(results: Sequence[RowResult]) -> str:
    keys = list(dict.fromkeys(key for result in results for key in result.row.space))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["row", "trial", "state", "objective", "client_steps", *keys])
    for result in results:
        for number, trial in enumerate(result.trials):
            state = (
                "failed" if trial.objective is None else "pruned" if trial.pruned else "complete"
            )
            values = [trial.values.get(key, "") for key in keys]
            objective = "" if trial.objective is None else trial.objective
            table.writerow([result.row.name, number, state, objective, trial.steps, *values])
    return text.getvalue()
