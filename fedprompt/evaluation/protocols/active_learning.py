"""Active learning: accuracy against the labels that have been asked for.

Source: Active Prompt Learning in Vision Language Models (Bang, Ahn, Lee, CVPR 2024, arXiv
2311.11178), which reports the accuracy after each of 8 rounds of queries. Here a point is the last
evaluated round of an active round, and the labels are those of all clients together. Which labels
are asked for, and how we differ in that, is in `fedprompt/data/partition/queries.py`. A run in
which all labels are known from the start is a single point, with which the others can be compared.

The protocol runs on the server after the last round and reads only the metrics of the rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedprompt.evaluation.protocol import Finished, NoOptions, Part, Reported
from fedprompt.methods.base import Method
from fedprompt.reports.figure import ACCURACY, MODEL_COLOURS, Axis, Curve, Figure, Lines, palette
from fedprompt.reports.format import Table, percent

if TYPE_CHECKING:
    from fedprompt.reports.run_data import RunData

MODELS = {"global": ("global", "accuracy"), "personal": ("personal", "mean")}


class ActiveLearning(Reported):
    """Accuracy after every active round."""

    name = "active_learning"
    title = "Active learning"
    caption = "Accuracy at the end of every active round, over the labels asked for so far."
    Options = NoOptions
    one_of = ("global", "personalised")

    @classmethod
    def suits(cls, method: Method) -> bool:
        """Whether the method learns from labels at all."""
        return method.trainable

    def measure(self, run: Finished) -> dict[str, Any]:
        """Labels and accuracies by active round, and the rule that chose the labels."""
        options, partition = self.config.partition, run.workspace.partition
        if not options.labels_per_round:
            labels = sum(len(partition.train(client)) for client in partition.trainable)
            first = {"labels": {"active_round": 1, "asked": labels}}
            return {"query": "all labels", "points": points([first, *run.rounds])}
        query = options.query + (" + PCB" if options.query_balanced else "")
        return {"query": query, "points": points(run.rounds)}

    @classmethod
    def table(cls, part: Part) -> Table:
        """One row per active round."""
        return _table(cls.title, [("", part)])

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """Both models over the labels."""
        curves = [_curve(model, MODEL_COLOURS[model], part["points"], model) for model in MODELS]
        return _figure(cls.name, f"Accuracy over labels: {part['query']}", cls.caption, curves)

    @classmethod
    def compare(cls, runs: Sequence[tuple[str, Part]]) -> tuple[Table, Figure]:
        """The global model of every run, or the personal one where there is no global."""
        curves = []
        for i, (name, part) in enumerate(runs):
            has_global = any(p["global"] is not None for p in part["points"])
            model = "global" if has_global else "personal"
            curves.append(_curve(f"{name}: {part['query']}", palette(i), part["points"], model))
        return _table(cls.title, runs), _figure(
            cls.name, "Accuracy over labels", cls.caption, curves
        )


def points(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The last accuracies of every active round.

    Args:
        rounds: the lines of `metrics.jsonl` of all rounds.

    Returns:
        By active round: its number, the `labels` of all clients so far, and the accuracies of the
        models, None where they were not measured.
    """
    found: list[dict[str, Any]] = []
    for line in rounds:
        if asked := line.get("labels"):
            empty = dict.fromkeys(MODELS)
            found.append({"active_round": asked["active_round"], "labels": asked["asked"], **empty})
        if found:
            measured = {m: (line.get(part) or {}).get(key) for m, (part, key) in MODELS.items()}
            found[-1] |= {m: value for m, value in measured.items() if value is not None}
    return found


def _curve(name: str, color: str, measured: Sequence[Part], model: str) -> Curve:
    known = [p for p in measured if p[model] is not None]
    return Curve(
        name=name, color=color, x=[p["labels"] for p in known], y=[p[model] for p in known]
    )


def _figure(name: str, title: str, caption: str, curves: Sequence[Curve]) -> Figure:
    axis = Axis(label="Labels of all clients", noun="with", format="count", low=0)
    panel = Lines(curves=[curve for curve in curves if curve.x], x=axis, y=ACCURACY)
    return Figure(name=name, title=title, caption=caption, panels=[panel])


def _table(title: str, runs: Sequence[tuple[str, Part]]) -> Table:
    rows = tuple(
        (
            " ".join(filter(None, (str(p["active_round"]), part["query"], name and f"({name})"))),
            f"{p['labels']:,}",
            percent(p["global"]),
            percent(p["personal"]),
        )
        for name, part in runs
        for p in part["points"]
    )
    note = (
        "Last evaluated round of each active round. Labels: asked for by all clients so far. "
        "Global: server's test images; personal: mean over clients, own test images."
    )
    return Table(title, ("active round", "labels", "global", "personal"), rows, note)
