"""Scores of personal models, as the server writes them to `metrics.jsonl` after an evaluation."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedprompt.federation.screening import NOT_FINITE, Row
from fedprompt.scoring import personal_statistics

BACKDOOR_COUNTS = ("backdoor-tested", "backdoor-hits", "backdoor-clean-hits")
"""Evaluation metrics of an attacker of a simulation: test images of other classes, how many of
them get the target class with its trigger, and how many without."""


def backdoor_part(rows: Mapping[int, Row]) -> dict[str, Any] | None:
    """How often the backdoor of a simulation's attackers works.

    Args:
        rows: the metrics `BACKDOOR_COUNTS` by attacker.

    Returns:
        The attack `success` rate, the mean over attackers of the share of test images of other
        classes that get the target class with the attacker's trigger; the share `without_trigger`;
        and the number of `attackers` that have a trigger. None if none of them has.
    """
    tested, hits, clean = BACKDOOR_COUNTS
    armed = [row for row in rows.values() if row[tested]]
    if not armed:
        return None
    # All attackers test the same images, so the pooled share is the mean over attackers.
    images = sum(row[tested] for row in armed)
    return {
        "success": sum(row[hits] for row in armed) / images,
        "without_trigger": sum(row[clean] for row in armed) / images,
        "attackers": len(armed),
    }


def personal_part(
    clients: Sequence[int], accuracy: Sequence[float], not_finite: Collection[int] = ()
) -> dict[str, Any] | None:
    """Statistics of the clients' accuracies.

    Args:
        clients: ids of the tested clients.
        accuracy: their accuracies in [0, 1], in the same order.
        not_finite: ids of those clients whose model gave no finite answer for some image.

    Returns:
        Plain JSON with the statistics, the ids and the accuracies, or None without any client. If
        there are any, `not_finite` lists the clients whose accuracy counts images without an
        answer as wrong. They stay in the mean: without them it would rise with every client that
        diverges.
    """
    statistics = personal_statistics(list(accuracy))
    if statistics is None:
        return None
    part = {**statistics.to_json(), "clients": list(clients), "accuracy": list(accuracy)}
    diverged = [client for client in clients if client in not_finite]
    return part | ({"not_finite": diverged} if diverged else {})


def personal_scores(rows: Mapping[int, Row], counts: tuple[str, str]) -> dict[str, Any] | None:
    """`personal_part` from checked evaluations.

    Args:
        rows: metrics by client id, ascending.
        counts: names of the metrics that count images and correct answers, such as `TEST_COUNTS`;
            clients without images are left out.

    Returns:
        As `personal_part`.
    """
    tested, correct = counts
    accuracy = {
        client: row[correct] / row[tested] for client, row in rows.items() if row.get(tested)
    }
    not_finite = {client for client, row in rows.items() if row.get(NOT_FINITE)}
    return personal_part(list(accuracy), list(accuracy.values()), not_finite)


def finite(value: Any) -> Any:
    """Plain JSON in which numbers that are not finite are None.

    JSON has no NaN, and a run must not end because a loss has diverged.
    """
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
