"""Few-shot: accuracy at a given number of training images per class and client.

Source: Learning to Prompt for Vision-Language Models (Zhou et al., IJCV 2022, arXiv 2109.01134),
which trains on 1, 2, 4, 8 and 16 images per class. How we differ: there the number counts images
of the whole training set; here `partition.shots` counts images per class and client, as in the
federated papers, so the federation holds up to K times as many.

The protocol runs on the server after the last round and reads only the run's summary. One run is
one point of the curve; `fedprompt sweep few_shot` runs all points and
`fedprompt compare --protocol few_shot` draws the curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedprompt.evaluation.protocol import Finished, Part, Reported
from fedprompt.reports.figure import ACCURACY, MODEL_COLOURS, Axis, Curve, Figure, Lines
from fedprompt.reports.figure_parts import model_bars
from fedprompt.reports.format import Table, percent, percent_spread

if TYPE_CHECKING:
    from fedprompt.reports.run_data import RunData

MODELS = {"zero-shot": "zero_shot", "global": "global", "personal": "personal"}


@dataclass(frozen=True)
class FewShotOptions:
    """The protocol has no options: the number of shots is `partition.shots`."""


class FewShot(Reported):
    """One point of the few-shot curve for a run, and the curve for several runs."""

    name = "few_shot"
    title = "Few-shot"
    caption = "Accuracy at the run's number of training images per class and client."
    Options = FewShotOptions
    one_of = ("global", "personalised")

    def measure(self, run: Finished) -> dict[str, Any]:
        """The accuracies, the number of shots and the number of training images."""
        partition, summary = run.workspace.partition, run.summary
        whole, own = summary["global"], summary["personal"] or {}
        zero = summary["zero_shot"]
        return {
            "shots": self.config.partition.shots,
            # Shots are labelled images, so those of clients without labels do not count.
            "train_images": sum(
                len(partition.train(k))
                for k in range(partition.num_clients)
                if k not in partition.unlabelled
            ),
            "clients": partition.num_clients,
            "accuracy": {
                "zero-shot": zero["accuracy"],
                "global": whole["accuracy"],
                "personal": own.get("mean"),
            },
            "std": {"personal": own.get("std")},
        }

    @classmethod
    def table(cls, part: Part) -> Table:
        """One row for this run."""
        return _table(cls.title, [("", part)])

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """Bars for this run; `compare` draws the curve over several runs."""
        return model_bars(
            cls.name,
            cls.title,
            cls.caption,
            [f"{_shots(part)} per class and client"],
            {model: [value] for model, value in part["accuracy"].items()},
            {model: [part["std"].get(model)] for model in part["accuracy"]},
        )

    @classmethod
    def compare(cls, runs: Sequence[tuple[str, Part]]) -> tuple[Table, Figure]:
        """The curve, with the mean over runs that have the same number of shots."""
        ordered = sorted(runs, key=lambda run: (_order(run[1]), run[0]))
        levels = list(dict.fromkeys(_shots(part) for _, part in ordered))
        curves = []
        for model in MODELS:
            by_level = [
                [p["accuracy"][model] for _, p in ordered if _shots(p) == level] for level in levels
            ]
            points = [
                (x, float(np.mean(known)))
                for x, values in enumerate(by_level)
                if (known := [v for v in values if v is not None])
            ]
            if points:
                x, y = zip(*points, strict=True)
                dashed = model == "zero-shot"
                color = MODEL_COLOURS[model]
                curves.append(Curve(name=model, color=color, x=x, y=y, dashed=dashed))
        axis = Axis(label="Training images per class and client", names=levels)
        figure = Figure(
            name=cls.name,
            title="Accuracy over shots",
            caption="Mean over runs with the same number of training images.",
            panels=[Lines(curves=curves, x=axis, y=ACCURACY)],
        )
        return _table(cls.title, ordered), figure


def _table(title: str, runs: Sequence[tuple[str, Part]]) -> Table:
    rows = tuple(
        (
            " ".join(filter(None, (_shots(part), name and f"({name})"))),
            f"{part['train_images']:,}",
            percent(part["accuracy"]["zero-shot"]),
            percent(part["accuracy"]["global"]),
            percent_spread(part["accuracy"]["personal"], part["std"]["personal"]),
        )
        for name, part in runs
    )
    columns = ("shots", "training images", "zero-shot", "global", "personal")
    note = (
        "Shots are training images per class and client, where a client holds so many. Zero-shot "
        "and global: server's test images; personal: mean ± std over clients, own test images."
    )
    return Table(title, columns, rows, note)


def _shots(part: Part) -> str:
    return "all" if part["shots"] is None else str(part["shots"])


def _order(part: Part) -> float:
    # A run without a limit has all images, so it comes last.
    return float("inf") if part["shots"] is None else float(part["shots"])
