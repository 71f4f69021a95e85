"""Base-to-new generalisation against a slow computation from the pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprompt.evaluation.metrics import harmonic_mean
from fedprompt.evaluation.registry import (
    result_tables,
)
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.methods.registry import method_class
from fedprompt.reports.run_data import load_run
from tests.support.protocol_runs import (
    config_of,
    logits,
    models_of,
    summary_of,
)


def test_base_to_new_by_a_second_way(runs: Callable[..., Path]) -> None:
    folder = runs("base_to_new")
    part = summary_of(folder)["protocols"]["base_to_new"]
    workspace, shared, own = models_of(folder)
    base, new = tuple(part["base_classes"]), tuple(part["new_classes"])
    assert (len(base), len(new)) == (10, 10)
    held = workspace.held_out
    assert held is not None
    trained = np.concatenate([workspace.partition.train(k) for k in range(4)])
    assert not set(trained) & set(held.index_N)
    assert (workspace.dataset.labels_N[trained] >= 0).all(), "no image of a new class is held"
    rows = {row["model"]: row for row in part["rows"]}

    def accuracy(names: tuple[str, ...], private: Any, index: Any, labels: Any) -> float:
        found = logits(workspace, names, shared, private, index).argmax(-1).numpy()
        return float((found == labels).mean())

    tests = workspace.partition.server_test
    base_labels = workspace.dataset.labels_N[tests]
    assert rows["global"]["base"] == accuracy(base, None, tests, base_labels)
    assert rows["global"]["new"] == accuracy(new, None, held.index_N, held.labels_N)
    everyone = [accuracy(new, own[k], held.index_N, held.labels_N) for k in range(4)]
    assert rows["personal"]["new"] == pytest.approx(np.mean(everyone))
    assert rows["personal"]["std"]["new"] == pytest.approx(np.std(everyone, ddof=1))
    assert len(set(everyone)) > 1, "personal models differ"
    assert rows["global"]["harmonic"] == pytest.approx(
        harmonic_mean(rows["global"]["base"], rows["global"]["new"])
    )
    both = accuracy((*base, *new), None, held.index_N, held.labels_N + len(base))
    assert rows["global"]["new_of_all"] == both
    assert both < rows["global"]["new"], "more names compete"
    lines = load_run(folder).rounds
    assert lines[-1]["protocols"]["base_to_new"]["new"] == rows["global"]["new"]
    assert rows["global"]["base"] == lines[-1]["global"]["accuracy"]


def test_a_random_base_depends_on_the_seed() -> None:
    def base(seed: int, how: str) -> tuple[str, ...]:
        options = {"base_to_new": {"base": how, "base_share": 0.55}}
        config = config_of("base_to_new", seed=seed, protocol_options=options)
        return open_workspace(config).task.class_names

    assert len(base(1, "random")) == 11, "0.55 of 20 classes, rounded up"
    assert base(1, "random") != base(2, "random")
    assert base(1, "random") == base(1, "random")
    assert base(1, "first") == base(2, "first")


def test_a_method_that_cannot_transfer_says_why(
    runs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(method_class("promptfl"), "no_transfer_reason", "it is bound to classes")
    folder = runs("base_to_new", "cross_data_set", method={"name": "promptfl"})
    part = summary_of(folder)["protocols"]
    rows = {row["model"]: row for row in part["base_to_new"]["rows"]}
    for model in ("global", "personal"):
        assert rows[model]["base"] is not None
        assert rows[model]["new"] is rows[model]["harmonic"] is None
        assert "bound to classes" in rows[model]["why"]
    tables = result_tables(summary_of(folder), "here")
    assert "bound to classes" in tables[0].note
    assert [row["global"] is None for row in part["cross_data_set"]["rows"]] == [False, True, True]
