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
    paths, configs = open_clip.factory._MODEL_CONFIG_PATHS, open_clip.factory._MODEL_CONFIGS
    before_paths, before_configs = list(paths), dict(configs)
    open_clip.add_model_config(folder)
    yield
    paths[:] = before_paths
    configs.clear()
    configs.update(before_configs)
