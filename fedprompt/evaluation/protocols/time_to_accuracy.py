"""Time to accuracy: how many simulated seconds pass until a model reaches an accuracy and keeps it.

Source of the measure: DAWNBench (Coleman et al., NeurIPS ML Systems Workshop 2017); of its use with
device speeds and bandwidths: FedScale (Lai et al., ICML 2022, arXiv 2105.11367). The seconds are
those of the simulated clock (`clock.enabled`, `fedprompt/federation/clock.py`), up to the round in
which the accuracy is reached. How we differ: an accuracy counts as reached in the first evaluated
round from which on all accuracies are at least that high, so a single lucky round is not rewarded.

The protocol runs on the server after the last round and reads only the metrics of the rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from fedprompt.config.fields import option
from fedprompt.errors import UserError
from fedprompt.evaluation.protocol import Finished, Part, Reported
from fedprompt.reports.figure import ACCURACY, MODEL_COLOURS, Axis, Curve, Figure, Lines, palette
from fedprompt.reports.format import MISSING, Table, percent

if TYPE_CHECKING:
    from fedprompt.reports.run_data import RunData
    from fedprompt.workspace import Workspace

MODELS = {"global": ("global", "accuracy"), "personal": ("personal", "mean")}
SECONDS = Axis(label="Simulated seconds", noun="after", format="number", low=0)


@dataclass(frozen=True)
class TimeToAccuracyOptions:
    """Which accuracies are timed."""

    targets: list[float] = option([50.0, 60.0, 70.0, 80.0, 90.0], "accuracies in percent")

    def check(self) -> None:
        """Refuse targets outside (0, 100]."""
        if not self.targets or not all(0 < target <= 100 for target in self.targets):
            raise UserError(f"'targets' is {self.targets}; each must be above 0 and at most 100.")


class TimeToAccuracy(Reported):
    """Simulated seconds until each accuracy is reached and kept."""

    name = "time_to_accuracy"
    title = "Simulated time to accuracy"
    caption = "Accuracy over the seconds of the simulated clock."
    Options = TimeToAccuracyOptions
    multi_label = True
    one_of = ("global", "personalised")
    options: TimeToAccuracyOptions

    def open(self, workspace: Workspace) -> None:
        """Refuse a run without a clock; see `Protocol.open`."""
        if not self.config.clock.enabled:
            raise UserError(
                "protocol time_to_accuracy reads the simulated clock; set clock.enabled=true, or "
                "leave it out of protocols."
            )

    def measure(self, run: Finished) -> dict[str, Any]:
        """The curve of each model, and when it reaches each target."""
        curves = {}
        for model, (part, key) in MODELS.items():
            if points := curve(run.rounds, part, key):
                curves[model] = {
                    "points": points,
                    "reached": [
                        {"target": target, **reached(points, target / 100)}
                        for target in self.options.targets
                    ],
                }
        return {"curves": curves}

    @classmethod
    def table(cls, part: Part) -> Table:
        """One row per model, one column per target."""
        return _table(cls.title, [("", part)])

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """Accuracy over seconds."""
        curves = [
            _curve(model, MODEL_COLOURS[model], found["points"])
            for model, found in part["curves"].items()
        ]
        return _figure(cls.name, cls.caption, curves)

    @classmethod
    def compare(cls, runs: Sequence[tuple[str, Part]]) -> tuple[Table, Figure]:
        """The global model of every run, or the personal one where there is no global."""
        curves = []
        for i, (name, part) in enumerate(runs):
            found = part["curves"].get("global") or part["curves"].get("personal")
            if found:
                curves.append(_curve(name, palette(i), found["points"]))
        return _table(cls.title, runs), _figure(cls.name, cls.caption, curves)


def curve(rounds: Sequence[Mapping[str, Any]], part: str, key: str) -> list[dict[str, Any]]:
    """The accuracy of a model over the seconds since the run began.

    Args:
        rounds: the lines of `metrics.jsonl` of all rounds.
        part: key of the model's results in a line, such as `global`.
        key: key of the accuracy in these results.

    Returns:
        For every evaluated round its `round`, `accuracy` and `seconds`.
    """
    times = accumulate((line.get("clock") or {}).get("seconds", 0.0) for line in rounds)
    return [
        {"round": line["round"], "accuracy": line[part][key], "seconds": seconds}
        for line, seconds in zip(rounds, times, strict=True)
        if line.get(part) and line[part].get(key) is not None
    ]


def reached(points: Sequence[Mapping[str, Any]], level: float) -> dict[str, Any]:
    """Find the first point from which all accuracies are at least `level`.

    Args:
        points: the result of `curve`, with at least one point.
        level: the accuracy, in (0, 1].

    Returns:
        The point's `round` and `seconds`; both None if the last accuracy is lower.
    """
    first = len(points)
    # The tolerance keeps float noise from excluding points that equal the level.
    while first > 0 and points[first - 1]["accuracy"] >= level - 1e-12:
        first -= 1
    if first == len(points):
        return {"round": None, "seconds": None}
    return {"round": points[first]["round"], "seconds": points[first]["seconds"]}


def _curve(name: str, color: str, points: Sequence[Mapping[str, Any]]) -> Curve:
    x = [point["seconds"] for point in points]
    return Curve(name=name, color=color, x=x, y=[point["accuracy"] for point in points])


def _figure(name: str, caption: str, curves: Sequence[Curve]) -> Figure:
    panel = Lines(curves=curves, x=SECONDS, y=ACCURACY, nearest=True)
    return Figure(name=name, title="Accuracy over simulated time", caption=caption, panels=[panel])


def _table(title: str, runs: Sequence[tuple[str, Part]]) -> Table:
    measured = [(name, model, f) for name, part in runs for model, f in part["curves"].items()]
    targets = sorted({mark["target"] for _, _, found in measured for mark in found["reached"]})
    rows = []
    for name, model, found in measured:
        times = {mark["target"]: mark["seconds"] for mark in found["reached"]}
        last = found["points"][-1]
        rows.append(
            (
                f"{name}, {model}" if name else model,
                *(_seconds(times.get(target)) for target in targets),
                _seconds(last["seconds"]),
                percent(last["accuracy"]),
            )
        )
    columns = ("model", *(f"{target:g} %" for target in targets), "whole run", "accuracy")
    note = (
        "Seconds of the simulated clock until the accuracy stays at the given value or above, of "
        "all rounds, and the last round's accuracy."
    )
    return Table(title, columns, tuple(rows), note)


def _seconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.1f} s"
