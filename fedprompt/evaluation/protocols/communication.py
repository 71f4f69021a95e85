"""Communication: bytes sent until x % of the final accuracy is reached and kept.

A level counts as reached in the first evaluated round from which on no evaluated round falls below
it, so that one lucky round is not rewarded. Final accuracy is that of the last round. Bytes are
those of all training messages up to then, as they cross the grid; tests are not counted. Rounds
that are not evaluated (`evaluation.every`) cannot be the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedprompt.config.fields import option
from fedprompt.errors import UserError
from fedprompt.evaluation.protocol import Finished, Part, Reported
from fedprompt.reports.format import Table, human_bytes, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fedprompt.reports.run_data import RunData

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
CURVES = {"global": ("global", "accuracy"), "personal": ("personal", "mean")}


@dataclass(frozen=True)
class CommunicationOptions:
    """Which shares of the final accuracy are looked for."""

    percents: list[float] = option([90.0, 95.0, 99.0], "percents of the final accuracy")

    def check(self) -> None:
        """Refuse shares that no accuracy can have."""
        if not self.percents or not all(0 < p <= 100 for p in self.percents):
            raise UserError(f"'percents' is {self.percents}; each must be above 0 and at most 100.")


class Communication(Reported):
    """Bytes up and down until the accuracy is nearly the final one."""

    name = "communication"
    title = "Communication to reach x % of the final accuracy"
    caption = "Accuracy over the bytes sent so far; dots: where 90, 95, ... % of the end is kept."
    Options = CommunicationOptions
    one_of = ("global", "personalised")
    options: CommunicationOptions

    def measure(self, run: Finished) -> dict[str, Any]:
        """For each curve and share: round, accuracy and bytes."""
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
        """One row per curve and share."""
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
        """Accuracy over bytes in both directions."""
        from fedprompt.reports.bars import MODEL_COLOURS, percent_axis
        from fedprompt.reports.style import INK, legend_above, new_figure, style

        figure = new_figure("Accuracy over communication", 3.6)
        axes = figure.subplots()
        style(axes)
        most = max((_sent(p) for c in part["curves"].values() for p in c["points"]), default=0)
        unit = [u for u in UNITS if UNITS[u] <= max(1, most / 4)][-1]
        for name, found in part["curves"].items():
            x = [_sent(p) / UNITS[unit] for p in found["points"]]
            y = [p["accuracy"] for p in found["points"]]
            colour = MODEL_COLOURS[name]
            axes.plot(x, y, color=colour, lw=2, label=name, drawstyle="steps-post")
            # Shares that are reached in the same round have one label.
            together: dict[tuple[float, float], list[str]] = {}
            for mark in found["reached"]:
                at = (_sent(mark) / UNITS[unit], mark["accuracy"])
                together.setdefault(at, []).append(f"{mark['percent']:g}")
            for (sent, accuracy), percents in together.items():
                axes.plot(sent, accuracy, "o", color=colour, ms=5)
                late = sent * UNITS[unit] > most / 2
                axes.annotate(
                    f"{', '.join(percents)} %", (sent, accuracy),
                    xytext=(-6 if late else 5, 5 if name == "global" else -12),
                    textcoords="offset points", ha="right" if late else "left", fontsize=8.5,
                    color=colour,
                )  # fmt: skip
        percent_axis(axes)
        axes.set_xlabel(f"{unit} up and down, all clients", fontsize=10.5, color=INK)
        axes.margins(x=0.04, y=0.1)
        legend_above(axes)
        return figure


def _sent(point: Mapping[str, Any]) -> int:
    return int(point["up"] + point["down"])


def curve(
    rounds: Sequence[Mapping[str, Any]], part: str, key: str
) -> list[tuple[int, float, int, int]]:
    """Round, accuracy and bytes up and down so far, of every evaluated round."""
    up = np.cumsum([line.get("bytes_up") or 0 for line in rounds]).tolist()
    down = np.cumsum([line.get("bytes_down") or 0 for line in rounds]).tolist()
    return [
        (line["round"], line[part][key], u, d)
        for line, u, d in zip(rounds, up, down, strict=True)
        if line.get(part) and line[part].get(key) is not None
    ]


def reached(points: Sequence[tuple[int, float, int, int]], share: float) -> dict[str, Any]:
    """The first point from which on no accuracy is below `share` of the last one."""
    level = share * points[-1][1]
    first = len(points) - 1
    # Float noise must not put the last point itself below the level.
    while first > 0 and points[first - 1][1] >= level - 1e-12:
        first -= 1
    server_round, accuracy, up, down = points[first]
    return {"round": server_round, "accuracy": accuracy, "up": up, "down": down}
