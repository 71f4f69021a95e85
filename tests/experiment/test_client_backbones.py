"""Clients that keep the weights of one backbone in several formats: who trains through which."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedprompt.backbone.compression import Compression
from fedprompt.config.schema import Config
from fedprompt.errors import UserError
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import run
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.reports.result_tables import remarks
from fedprompt.simulation.blocks import group
from fedprompt.workspace import Workspace
from tests.support.builders import small_config
from tests.support.protocol_runs import silent

MIXED: dict[str, Any] = {
    "backbone": {"client_weights": ["float32", "fp16"]},
    "method": {"name": "promptfl", "context_tokens": 2},
    "data": {"images_per_class": 4, "domains": ["delta"]},
    "partition": {"clients": 3, "alpha": 10.0, "local_test_fraction": 0.3},
    "federation": {"rounds": 1},
}


@pytest.fixture(scope="module")
def workspace() -> Workspace:
    return open_workspace(small_config(**MIXED))


def test_formats_are_dealt_in_turn() -> None:
    backbone = small_config(**MIXED).backbone
    assert [backbone.weights_of(k) for k in range(4)] == ["float32", "fp16"] * 2
    assert small_config().backbone.weights_of(3) == "float32"
    with pytest.raises(UserError, match=r"client_weights: 'int9'"):
        small_config(backbone={"client_weights": ["int9"]})


def test_a_client_computes_through_its_own_backbone(workspace: Workspace) -> None:
    whole, half = workspace.of_client(0), workspace.of_client(1)
    assert whole is workspace
    assert half is workspace.of_client(3)
    assert half.clip.compression == Compression("fp16")
    assert half.method.clip is half.clip
    found, expected = (w.test_data(1)[0].features for w in (half, whole))
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)
    # A derived workspace is one federation in one format.
    assert half.of_client(0) is half


def test_blocks_hold_clients_of_one_format(workspace: Workspace) -> None:
    blocks = group(workspace, [0, 1, 2], 8)
    assert sorted(map(sorted, blocks)) == [[0, 2], [1]]


def test_a_run_reports_accuracy_by_format(run_config: Callable[..., Config]) -> None:
    config = run_config(**MIXED)
    path = run(config, QuietDisplay(silent()))
    summary = json.loads((path / "summary.json").read_text())
    found = summary["by_backbone"]
    assert {name: part["clients"] for name, part in found.items()} == {
        "float32": [0, 2],
        "fp16": [1],
    }
    personal = summary["personal"]
    accuracy = dict(zip(personal["clients"], personal["accuracy"], strict=True))
    for part in found.values():
        own = [accuracy[k] for k in part["clients"] if k in accuracy]
        assert part["personal"] == (pytest.approx(np.mean(own)) if own else None)
    assert accuracy
    assert found["float32"]["global"] == summary["global"]["accuracy"]
    assert 0 <= found["fp16"]["global"] <= 1
    lines = [line for line in remarks(summary) if "backbone fp16" in line]
    assert len(lines) == 1
