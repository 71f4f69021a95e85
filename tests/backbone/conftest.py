"""The small architectures of `tests/support/small_models.py`, known to open_clip by name."""

from __future__ import annotations

import json
from collections.abc import Iterator

import open_clip
import pytest

from tests.support.small_models import MODELS


@pytest.fixture(scope="module")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Add the architectures to open_clip's own, and remove them afterwards."""
    folder = tmp_path_factory.mktemp("models")
    for name, cfg in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(cfg))
    factory = open_clip.factory
    listed = open_clip.list_models()
    with pytest.MonkeyPatch.context() as patch:
        # open_clip binds a new dictionary at every addition, so both names are put back.
        patch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
        patch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
        open_clip.add_model_config(folder)
        yield
    assert open_clip.list_models() == listed
