"""Workspaces for rounds of secure aggregation."""

from __future__ import annotations

import pytest

from tests.support.secure_rounds import MakeWorkspace


@pytest.fixture
def make_workspace(make_workspace: MakeWorkspace) -> MakeWorkspace:
    """One small step per client: no change exceeds the clip."""
    training = {"lr": 0.02, "batch_size": 64}
    return lambda **sections: make_workspace(**{"training": training, **sections})
