"""Communication: how many bytes are sent until a model stays above x % of its final accuracy.

A level counts as reached in the first evaluated round from which on all accuracies are at least
that high, so a single lucky round is not rewarded. The final accuracy is that of the last round.
Bytes are those of all training messages up to the round in which the level is reached, as they
cross the grid; messages of evaluations are not counted. Rounds that are not evaluated
(`evaluation.every`) are not considered.

The protocol runs on the server after the last round and reads only the metrics of the rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedprompt.config.fields import option
from fedprompt.errors import UserError
from fedprompt.evaluation.protocol import Finished, Part, Reported
from fedprompt.reports.figure import ACCURACY, MODEL_COLOURS, Axis, Curve, Figure, Lines
from fedprompt.reports.format import Table, human_bytes, percent

if TYPE_CHECKING:
    from fedprompt.reports.run_data import RunData

CURVES = {"global": ("global", "accuracy"), "personal": ("personal", "mean")}


@dataclass(frozen=True)
class CommunicationOptions:
    """Which percentages of the final accuracy are reported."""

    percents: list[float] = option([90.0, 95.0, 99.0], "percents of the final accuracy")

    def check(self) -> None:
        """Refuse percentages outside (0, 100]."""
        if not self.percents or not all(0 < p <= 100 for p in self.percents):
            raise UserError(f"'percents' is {self.percents}; each must be above 0 and at most 100.")


class Communication(Reported):
    """Bytes up and down until the accuracy is close to the final one."""

    name = "communication"
    title = "Communication to reach x % of the final accuracy"
    caption = "Accuracy over the bytes sent so far; dots: where 90, 95, ... % of the end is kept."
    Options = CommunicationOptions
    multi_label = True
    one_of = ("global", "personalised")
    options: CommunicationOptions

    def measure(self, run: Finished) -> dict[str, Any]:
        """Round, accuracy and bytes for each curve and percentage."""
        curves = {}
        for name, (part, key) in CURVES.items():
            points = curve(run.rounds, part, key)
            if points:
                curves[name] = {
                    "points": [
                        {"round": r, "accuracy": a, "up": u, "down": d} for r, a, u, d in points
                    ],
                    "reached": [
                        {"percent": p, **reached(points, p / 100)} for p in self.options.percents
                    ],
                }
        return {"curves": curves}

    @classmethod
    def table(cls, part: Part) -> Table:
        """One row per curve and percentage."""
        rows = [
            (
                f"{name}, {mark['percent']:g} %",
                percent(mark["accuracy"]),
                str(mark["round"]),
                human_bytes(mark["up"]),
                human_bytes(mark["down"]),
            )
            for name, found in part["curves"].items()
            for mark in found["reached"]
        ]
        note = (
            "First evaluated round from which on the accuracy stays at x % of the last round's or "
            "above; bytes of all clients' training messages up to that round."
        )
        columns = ("model, share of the end", "accuracy", "round", "up", "down")
        return Table(cls.title, columns, tuple(rows), note)

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """Accuracy over the bytes in both directions."""
        curves = []
        for name, measured in part["curves"].items():
            color = MODEL_COLOURS[name]
            points = measured["points"]
            # The curve is a step function, since an accuracy holds until the next evaluation.
            x = [_sent(point) for point in points for _ in range(2)][1:]
            y = [point["accuracy"] for point in points for _ in range(2)][:-1]
            curves.append(Curve(name=name, color=color, x=x, y=y))
            # Percentages that are reached in the same round share one label.
            together: dict[tuple[int, float], list[str]] = {}
            for mark in measured["reached"]:
                place = (_sent(mark), mark["accuracy"])
                together.setdefault(place, []).append(f"{mark['percent']:g}")
            curves.append(
                Curve(
                    name=f"{name}: share of the end",
                    color=color,
                    x=[sent for sent, _ in together],
                    y=[accuracy for _, accuracy in together],
                    joined=False,
                    notes=[f"{', '.join(percents)} %" for percents in together.values()],
                )
            )
        sent = Axis(label="Bytes up and down, all clients", noun="after", format="bytes", low=0)
        panel = Lines(
            curves=[curve for curve in curves if curve.x], x=sent, y=ACCURACY, nearest=True
        )
        return Figure(
            name=cls.name, title="Accuracy over communication", caption=cls.caption, panels=[panel]
        )


def _sent(point: Mapping[str, Any]) -> int:
    return int(point["up"] + point["down"])


def curve(
    rounds: Sequence[Mapping[str, Any]], part: str, key: str
) -> list[tuple[int, float, int, int]]:
    """The accuracy of a model over the rounds and the bytes sent.

    Args:
        rounds: the lines of `metrics.jsonl` of all rounds.
        part: key of the model's results in a line, such as `global`.
        key: key of the accuracy in these results.

    Returns:
        For every evaluated round: round, accuracy, and bytes up and down since the run began.
    """
    # Summed over all rounds, since rounds that are not evaluated send bytes too.
    up = np.cumsum([line.get("bytes_up") or 0 for line in rounds]).tolist()
    down = np.cumsum([line.get("bytes_down") or 0 for line in rounds]).tolist()
    return [
        (line["round"], line[part][key], u, d)
        for line, u, d in zip(rounds, up, down, strict=True)
        if line.get(part) and line[part].get(key) is not None
    ]


def reached(points: Sequence[tuple[int, float, int, int]], share: float) -> dict[str, Any]:
    """Find the first point from which all accuracies are at least a fraction of the last one.

    Args:
        points: the result of `curve`, with at least one point.
        share: fraction of the last accuracy, in (0, 1].

    Returns:
        The point's `round`, `accuracy`, and bytes `up` and `down`.
    """
    level = share * points[-1][1]
    first = len(points) - 1
    # The tolerance keeps float noise from excluding points that equal the level.
    while first > 0 and points[first - 1][1] >= level - 1e-12:
        first -= 1
    server_round, accuracy, up, down = points[first]
    return {"round": server_round, "accuracy": accuracy, "up": up, "down": down}
