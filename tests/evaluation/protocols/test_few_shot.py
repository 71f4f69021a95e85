"""Few-shot runs and their curve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedprompt.evaluation.registry import (
    compare_runs,
)
from fedprompt.experiment.compose import compose
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.reports.figure import Lines
from fedprompt.reports.run_data import load_run
from tests.support.protocol_runs import (
    summary_of,
)


def test_few_shot_holds_no_more_than_that(runs: Callable[..., Path]) -> None:
    folders = [runs("few_shot", partition={"clients": 4, "shots": s}) for s in (2, 1)]
    table, figure = compare_runs("few_shot", [load_run(f) for f in folders])
    assert [row[0].split()[0] for row in table.rows] == ["1", "2"]
    (panel,) = figure.panels
    assert isinstance(panel, Lines)
    assert [curve.name for curve in panel.curves] == ["zero-shot", "global", "personal"]
    assert list(panel.curves[1].y) == [
        summary_of(f)["global"]["accuracy"] for f in reversed(folders)
    ]
    for folder, shots in zip(folders, (2, 1), strict=True):
        part = summary_of(folder)["protocols"]["few_shot"]
        workspace = open_workspace(compose(folder / "config.yaml"))
        counts_KC = workspace.partition.train_counts(workspace.dataset.labels_N, 20)
        assert counts_KC.max() == shots
        assert part["train_images"] == counts_KC.sum()
        assert part["shots"] == shots
