"""The measures of class-incremental learning: by hand, and those of a run from its pixels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedprompt.evaluation.protocols.class_incremental import measures
from tests.support.protocol_runs import logits, models_of, summary_of


def test_measures_by_hand() -> None:
    rows = measures(
        [
            {"tested": [10], "correct": [8]},
            {"tested": [10, 5], "correct": [6, 4]},
            {"tested": [10, 5, 5], "correct": [7, 2, 5]},
        ]
    )
    assert rows[0] == {
        "seen": 0.8, "old": None, "new": 0.8, "harmonic": None, "forgetting": None,
    }  # fmt: skip
    assert rows[1]["forgetting"] == pytest.approx(0.2)
    assert rows[1]["harmonic"] == pytest.approx(2 * 0.6 * 0.8 / 1.4)
    assert rows[2]["seen"] == pytest.approx(14 / 20)
    assert rows[2]["old"] == pytest.approx(9 / 15)
    # Best earlier accuracies: 0.8 of session 1 and 0.8 of session 2.
    assert rows[2]["forgetting"] == pytest.approx((0.1 + 0.4) / 2)


def test_sessions_without_test_images_have_no_accuracy() -> None:
    rows = measures([{"tested": [0], "correct": [0]}, {"tested": [0, 2], "correct": [0, 1]}])
    assert rows[0]["seen"] is rows[1]["old"] is rows[1]["forgetting"] is None
    assert rows[1]["seen"] == rows[1]["new"] == 0.5


def test_a_run_measures_its_models_among_all_names_seen(runs: Callable[..., Path]) -> None:
    folder = runs("class_incremental")
    workspace, shared, _ = models_of(folder)
    part = summary_of(folder)["protocols"]["class_incremental"]
    index = workspace.partition.server_test
    labels = workspace.dataset.labels_N[index]
    right = logits(workspace, workspace.task.class_names, shared, None, index).argmax(-1).numpy()
    right = right == labels
    first = len(part["classes"][0])
    last = part["models"]["global"][-1]
    assert last["seen"] == pytest.approx(right.mean())
    assert last["old"] == pytest.approx(right[labels < first].mean())
    assert last["new"] == pytest.approx(right[labels >= first].mean())
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["global"]["accuracy"] == pytest.approx(last["seen"])
    assert part["personal"] == [line["personal"]["mean"] for line in lines[1:]]
    # Zero-shot CLIP knows few names in the first session and does not learn.
    plain = part["models"]["zero-shot"]
    assert plain[0]["seen"] >= plain[1]["old"]
