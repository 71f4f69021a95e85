"""Fairness over clients, by hand and in a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedprompt.evaluation.protocols.fairness import gap, spread
from tests.support.protocol_runs import (
    summary_of,
)


def test_fairness_has_the_summarys_clients(runs: Callable[..., Path]) -> None:
    folder = runs("fairness", evaluation={"local_only": True})
    summary = summary_of(folder)
    part = summary["protocols"]["fairness"]
    for model, entry in (
        ("personal", summary["personal"]),
        ("zero-shot", summary["zero_shot"]["personal"]),
        ("local-only", summary["local_only"]["personal"]),
    ):
        for key in ("mean", "std", "worst", "p10"):
            assert part["models"][model][key] == entry[key]
    difference = np.array(summary["personal"]["accuracy"]) - np.array(
        summary["local_only"]["personal"]["accuracy"]
    )
    assert part["to_local_only"]["mean"] == pytest.approx(difference.mean())
    assert part["to_local_only"]["worse"] == int((difference < 0).sum())


def test_fairness_by_hand() -> None:
    found = spread({0: 0.2, 1: 0.6, 4: 1.0}, 0.5)
    assert found["lowest_mean"] == pytest.approx(0.4)
    assert found["gini"] == pytest.approx((2 * 0.2 * 0 + 0.4 * 4 + 0.8 * 2) / (9 * 2 * 0.6))
    assert gap({0: 0.5, 1: 0.7}, {1: 0.9, 2: 0.1}) == {
        "clients": 1, "mean": pytest.approx(-0.2), "lowest": pytest.approx(-0.2), "worse": 1,
    }  # fmt: skip
    assert gap({0: 0.5}, {}) is None
