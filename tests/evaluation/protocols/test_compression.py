"""Prompts learned through one format and tested through another: which federation, which test."""

from __future__ import annotations

from typing import Any

import pytest

from fedprompt.backbone.compression import Compression
from fedprompt.errors import UserError
from fedprompt.evaluation.protocols.compression import CompressionMatrix
from fedprompt.evaluation.registry import result_tables
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import _train_references
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.federation.server_app import Federation
from fedprompt.scoring import score_global
from fedprompt.simulation.inline_grid import InlineGrid
from tests.support.builders import small_config
from tests.support.protocol_runs import silent

QUICK: dict[str, Any] = {
    "method": {"name": "promptfl", "context_tokens": 2},
    "data": {"images_per_class": 4, "domains": ["delta"]},
    "partition": {"clients": 2, "alpha": 10.0},
    "federation": {"rounds": 1},
    "training": {"lr": 0.5, "batch_size": 8},
    "protocols": ["global", "compression"],
    "protocol_options": {"compression": {"formats": ["fp16"], "pruned": [0.9]}},
}


def test_the_matrix() -> None:
    workspace = open_workspace(small_config(**QUICK))
    grid = InlineGrid(workspace)
    federation = Federation(workspace, grid)
    federation.protocols.open()
    federation.join()
    federation.train_round(1)
    _train_references(federation, grid, QuietDisplay(silent()))
    found = federation.measure_protocols([], {})["compression"]
    assert found["formats"] == ["float32", "fp16", "float32, 90 % pruned"]

    # By hand: a federation of its own in the pruned form, tested through the whole one.
    own = small_config(**{**QUICK, "backbone": {"pruned": 0.9}, "protocols": ["global"]})
    pruned = open_workspace(own)
    other = Federation(pruned, InlineGrid(pruned))
    other.join()
    other.train_round(1)
    for column, tested in ((0, workspace), (2, pruned)):
        for row, learned in ((0, federation), (2, other)):
            score = score_global(tested.method, learned.shared, *tested.server_test())
            assert score is not None
            assert found["accuracy"][row][column] == score.accuracy
    (table,) = result_tables({"protocols": {"compression": found}}, "summary")
    assert len(table.rows) == 4
    assert all(len(row) == 5 for row in table.rows)


def test_forms_are_named_once_and_the_own_one_comes_first() -> None:
    config = small_config(
        **{**QUICK, "backbone": {"weights": "fp16"}},
    )
    protocol = CompressionMatrix(CompressionMatrix.Options(["fp16", "float32"], [0.5]), config)
    assert protocol.forms(config.backbone) == [
        Compression("fp16"),
        Compression("float32"),
        Compression("float32", 0.5),
    ]


@pytest.mark.parametrize(
    ("options", "key"), [({"formats": ["int9"]}, "int9"), ({"pruned": [1.0]}, "pruned")]
)
def test_refusals(options: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        small_config(**{**QUICK, "protocol_options": {"compression": options}})
