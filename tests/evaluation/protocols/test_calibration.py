"""Calibration and accuracy per class against a slow computation from the pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.protocol_runs import (
    logits,
    models_of,
    summary_of,
)


def test_calibration_and_classes_by_a_second_way(runs: Callable[..., Path]) -> None:
    folder = runs("calibration", "per_class")
    part = summary_of(folder)["protocols"]
    workspace, shared, own = models_of(folder)
    names, labels_N = workspace.task.class_names, workspace.dataset.labels_N
    confidence: list[float] = []
    hits: list[bool] = []
    tested, right = np.zeros(20), np.zeros(20)
    for k in range(4):
        index = workspace.partition.test(k)
        p = logits(workspace, names, shared, own[k], index).double().softmax(-1)
        found = p.argmax(-1).numpy()
        confidence += p.amax(-1).tolist()
        hits += (found == labels_N[index]).tolist()
        np.add.at(tested, labels_N[index], 1)
        np.add.at(right, labels_N[index], found == labels_N[index])
    personal = part["calibration"]["models"]["personal"]
    assert personal["images"] == len(hits)
    assert personal["mean_accuracy"] == pytest.approx(np.mean(hits))
    expected = 0.0
    for m in range(15):
        inside = [i for i, c in enumerate(confidence) if m / 15 < c <= (m + 1) / 15]
        if inside:
            gap_m = np.mean([confidence[i] for i in inside]) - np.mean([hits[i] for i in inside])
            expected += abs(gap_m) * len(inside) / len(hits)
    assert personal["ece"] == pytest.approx(expected, abs=1e-4)
    for c in range(20):
        share = right[c] / tested[c] if tested[c] else None
        assert part["per_class"]["accuracy"]["personal"][c] == pytest.approx(share)
    counts = np.array(part["per_class"]["confusion"])
    assert counts.sum() == len(workspace.partition.server_test)
    accuracy = np.trace(counts) / counts.sum()
    assert accuracy == pytest.approx(summary_of(folder)["global"]["accuracy"])
