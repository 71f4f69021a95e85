"""Cross-data-set transfer against a slow computation from the pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedprompt.experiment.workspaces import open_workspace
from fedprompt.workspace import Workspace
from tests.support.protocol_runs import (
    config_of,
    logits,
    models_of,
    summary_of,
)


def test_cross_data_set_uses_the_targets_own_names(runs: Callable[..., Path]) -> None:
    folder = runs("cross_data_set")
    rows = summary_of(folder)["protocols"]["cross_data_set"]["rows"]
    assert [(r["data"], r["images"], r["classes"], r["known_classes"]) for r in rows] == [
        ("aerial_scenes", 120, 20, 20), ("steppe", 20, 20, 20), ("oasis", 3, 3, 3),
    ]  # fmt: skip
    assert rows[0]["global"] == summary_of(folder)["global"]["accuracy"]
    workspace, shared, _ = models_of(folder)
    config = config_of(data={"images_per_class": 4, "domains": ["oasis"]})
    oasis = open_workspace(config)
    names = ("beach", "runway", "sea ice")
    labels = [oasis.task.class_names.index(name) for name in names]
    # Of four images per class the last one is the test image.
    index = [int(np.flatnonzero(oasis.dataset.labels_N == label)[3]) for label in labels]
    pictures = Workspace(
        workspace.config, workspace.clip, oasis.dataset, oasis.partition, oasis.views
    )
    found = logits(pictures, names, shared, None, index).argmax(-1)
    assert rows[2]["global"] == pytest.approx((found == torch.arange(3)).double().mean())
