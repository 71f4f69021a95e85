"""Accuracy by group and by number of holders, against slow computations from the pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprompt.errors import UserError
from fedprompt.evaluation.predictions import by_group, shares
from fedprompt.evaluation.protocols.per_group import group_names, groups_of
from fedprompt.evaluation.registry import compare_runs, open_protocols
from fedprompt.reports.run_data import load_run
from fedprompt.workspace import Workspace
from tests.support.builders import fake_dataset
from tests.support.protocol_runs import logits, models_of, summary_of


def test_counts_by_group() -> None:
    tested, correct = by_group(np.array([True, False, True]), np.array([2, 0, 2]), 4)
    assert tested.tolist() == [1, 0, 2, 0]
    assert correct.tolist() == [0, 0, 2, 0]
    assert shares(correct, tested) == [0, None, 1, None]


def test_groups_by_a_second_way(runs: Callable[..., Path]) -> None:
    folder = runs("per_group")
    part = summary_of(folder)["protocols"]["per_group"]
    workspace, shared, own = models_of(folder)
    dataset, names = workspace.dataset, workspace.task.class_names
    assert part["names"] == ["savanna", "highland", "delta"]

    def right(index: Any, private: Any) -> Any:
        found = logits(workspace, names, shared, private, index).argmax(-1).numpy()
        return found == dataset.labels_N[index]

    server = workspace.partition.server_test
    hits, domain = right(server, None), dataset.domains_N[server]
    by_domain = [hits[domain == d].mean() for d in range(3)]
    found = part["models"]["global"]
    assert found["accuracy"] == pytest.approx(by_domain)
    assert found["worst"] == pytest.approx(min(by_domain))
    assert found["gap"] == pytest.approx(max(by_domain) - min(by_domain))
    pooled, gaps = np.zeros((2, 3)), []
    for k in range(4):
        index = workspace.partition.test(k)
        hits, domain = right(index, own[k]), dataset.domains_N[index]
        counts = np.array([[(domain == d).sum(), hits[domain == d].sum()] for d in range(3)]).T
        pooled += counts
        each = [c / n for n, c in counts.T if n]
        gaps += [max(each) - min(each)] if len(each) > 1 else []
    assert part["models"]["personal"]["accuracy"] == pytest.approx(pooled[1] / pooled[0])
    assert part["client_gap"] == pytest.approx(np.mean(gaps))
    table, _ = compare_runs("per_group", [load_run(folder)])
    assert [row[1] for row in table.rows] == ["zero-shot", "global", "personal"]


def test_groups_of_one_kind_are_refused(make_workspace: Callable[..., Workspace]) -> None:
    workspace = make_workspace(
        protocols=["global", "per_group"], protocol_options={"per_group": {"by": "superclass"}}
    )
    (protocol,) = [p for p in open_protocols(workspace.config) if p.name == "per_group"]
    with pytest.raises(UserError, match=r"per_group.*superclass.*0 groups.*per_group\.by"):
        protocol.open(workspace)


def test_superclasses_are_groups() -> None:
    dataset = replace(fake_dataset(), superclass_names=("water", "built", "water", "built"))
    dataset = replace(dataset, labels_N=dataset.labels_N % 4)
    assert group_names(dataset, "superclass") == ("water", "built")
    assert groups_of(dataset, "superclass").tolist() == (dataset.labels_N % 2).tolist()
    assert groups_of(dataset, "domain").tolist() == dataset.domains_N.tolist()


def test_open_set_by_a_second_way(runs: Callable[..., Path]) -> None:
    folder = runs("open_set")
    part = summary_of(folder)["protocols"]["open_set"]
    workspace, shared, own = models_of(folder)
    held = workspace.held_out
    assert held is not None
    names = (*workspace.task.class_names, *held.class_names)
    partition, labels_N = workspace.partition, workspace.dataset.labels_N
    index = np.concatenate([partition.server_test, held.index_N])
    truth = np.concatenate([labels_N[partition.server_test], held.labels_N + 15])
    holders = [sum(c in labels_N[partition.train(k)] for k in range(4)) for c in range(15)]
    kind = np.array(["all" if h == 4 else "some" if h else "none" for h in holders] + ["none"] * 5)
    assert part["classes"] == {h: int((kind == h).sum()) for h in ("all", "some", "none")}
    rows = {row["model"]: row for row in part["rows"]}
    right = logits(workspace, names, shared, None, index).argmax(-1).numpy() == truth
    each = [logits(workspace, names, shared, p, index).argmax(-1).numpy() == truth for p in own]
    for h in ("some", "none"):
        mask = kind[truth] == h
        assert rows["global"][h] == pytest.approx(right[mask].mean())
        assert rows["personal"][h] == pytest.approx(np.mean([r[mask].mean() for r in each]))
    table, _ = compare_runs("open_set", [load_run(folder)])
    assert len(table.rows) == 3


def test_prompts_of_single_classes_are_tested_without_new_names(runs: Callable[..., Path]) -> None:
    part = summary_of(runs("open_set", method={"name": "palm"}, strategy={"name": "auto"}))
    part = part["protocols"]["open_set"]
    assert "belongs to the class" in part["why"]
    assert part["images"]["none"] < 60
    assert sum(part["classes"].values()) == 15
