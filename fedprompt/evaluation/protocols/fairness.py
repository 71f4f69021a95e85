"""Fairness: how evenly accuracy is spread over clients, and which would be better off alone.

Sources: Fair Resource Allocation in Federated Learning (Li et al., ICLR 2020, arXiv 1905.10497) for
the spread and the worst tenth; Jain, Chiu and Hawe (DEC TR-301, 1984) for the index; Gini's
coefficient. Every client with test images counts once, however many it has. The standard deviation
is that of a sample, with divisor n - 1.

The protocol runs on the server after the last round and reads only the run's summary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedprompt.config.fields import option
from fedprompt.evaluation.metrics import gini, jain, mean_of_lowest
from fedprompt.evaluation.protocol import Finished, Part, Reported
from fedprompt.reports.figure import MODEL_COLOURS, Axis, Curve, Figure, Lines
from fedprompt.reports.figure_parts import stairs
from fedprompt.reports.format import Table, percent
from fedprompt.reports.run_data import accuracy_of
from fedprompt.statistics import sample_std

if TYPE_CHECKING:
    from fedprompt.reports.run_data import RunData


@dataclass(frozen=True)
class FairnessOptions:
    """How many clients count as the lowest ones."""

    lowest_share: float = option(0.1, "share of clients whose mean is reported", gt=0, le=1)


class Fairness(Reported):
    """Spread of accuracies over clients, for personal models, zero-shot and local-only training."""

    name = "fairness"
    title = "Fairness over clients"
    caption = "Share of clients (y) with at most this accuracy (x); a steep line is an even spread."
    Options = FairnessOptions
    multi_label = True
    one_of = ("personalised",)
    options: FairnessOptions

    def measure(self, run: Finished) -> dict[str, Any]:
        """The spread over clients for each model, and the gap to local-only training."""
        summary = run.summary
        found = {
            "zero-shot": accuracy_of((summary.get("zero_shot") or {}).get("personal")),
            "local-only": accuracy_of((summary.get("local_only") or {}).get("personal")),
            "personal": accuracy_of(summary.get("personal")),
        }
        # Baselines that were not run, and runs without test images, have no accuracies.
        share = self.options.lowest_share
        models = {name: spread(values, share) for name, values in found.items() if values}
        own, alone = found["personal"], found["local-only"]
        return {
            "lowest_share": share,
            "models": models,
            "accuracy": {name: list(values.values()) for name, values in found.items() if values},
            "to_local_only": gap(own, alone),
        }

    @classmethod
    def table(cls, part: Part) -> Table:
        """One row per model."""
        lowest = f"lowest {100 * part['lowest_share']:g} %"
        columns = ("model", "mean", "std", "worst", "10th pct.", lowest, "Jain", "Gini")
        rows = tuple(
            (
                name,
                *(percent(m[key]) for key in ("mean", "std", "worst", "p10", "lowest_mean")),
                f"{m['jain']:.3f}",
                f"{m['gini']:.3f}",
            )
            for name, m in part["models"].items()
        )
        note = "Own test images, each client counted once; Jain 1 and Gini 0 = all equal."
        beside = part["to_local_only"]
        if beside is not None:
            note += (
                f" Personal minus local-only accuracy: mean {_points(beside['mean'])}, lowest "
                f"{_points(beside['lowest'])} points; {beside['worse']} of {beside['clients']} "
                "clients would be better off alone."
            )
        return Table(cls.title, columns, rows, note)

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """The cumulative distribution of accuracies over clients."""
        curves = []
        for name, accuracy in part["accuracy"].items():
            edges_K = np.sort(np.array(accuracy, dtype=float)).tolist()
            share_K = (np.arange(1, len(edges_K) + 1) / len(edges_K)).tolist()
            x, y = stairs([edges_K[0], *edges_K, 1.0], [0.0, *share_K])
            curves.append(Curve(name=name, color=MODEL_COLOURS[name], x=x, y=y))
        panel = Lines(
            curves=curves,
            x=Axis(label="Accuracy", format="percent", low=0, high=1),
            y=Axis(label="Clients at or below", format="percent", low=0, high=1),
            nearest=True,
        )
        return Figure(
            name=cls.name,
            title="Clients by accuracy on own test images",
            caption=cls.caption,
            panels=[panel],
        )


def _points(difference: float) -> str:
    """Format a difference of fractions in percentage points; adding 0.0 avoids "-0.0"."""
    return f"{round(100 * difference, 1) + 0.0:+.1f}"


def spread(accuracy: Mapping[int, float], lowest_share: float) -> dict[str, Any]:
    """Compute statistics over clients, each of which counts once.

    Args:
        accuracy: accuracy by client id, as fractions; at least one client.
        lowest_share: fraction of clients for `lowest_mean`.

    Returns:
        The statistics by name, as plain numbers.
    """
    values = np.array(list(accuracy.values()), dtype=np.float64)
    return {
        "clients": len(values),
        "mean": float(values.mean()),
        "std": sample_std(list(accuracy.values())),
        "worst": float(values.min()),
        "p10": float(np.percentile(values, 10)),
        "lowest_mean": mean_of_lowest(values, lowest_share),
        "jain": jain(values),
        "gini": gini(values),
    }


def gap(own: Mapping[int, float], alone: Mapping[int, float]) -> dict[str, Any] | None:
    """Compare personal models with local-only training.

    Args:
        own: accuracy of the personal model by client id.
        alone: accuracy of local-only training by client id.

    Returns:
        Statistics of own minus local-only accuracy over the clients that were tested with both, or
        None if there are none.
    """
    both = [own[k] - alone[k] for k in own if k in alone]
    if not both:
        return None
    return {
        "clients": len(both),
        "mean": float(np.mean(both)),
        "lowest": min(both),
        "worse": sum(difference < 0 for difference in both),
    }
