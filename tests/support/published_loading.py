"""Opening miniature copies of published data sets, and how a bad copy is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedprompt.data import catalogue, open_dataset
from fedprompt.data.dataset import ImageDataset
from fedprompt.errors import UserError
from fedprompt.experiment.validate import validate

NAMES = catalogue.names()


def load(name: str, root: Path, **keys: Any) -> ImageDataset:
    """The copy of the data set `name` in `root`, with further keys of the `data` section."""
    raw = {**catalogue.data_keys(name), "root": str(root), **keys}
    config = validate({"data": raw})
    return open_dataset(config.data, 1, cache_dir=root.parent / "cache")


def one_line(name: str, root: Path, **keys: Any) -> str:
    """The message with which the copy is refused, which must be one line."""
    with pytest.raises(UserError) as caught:
        load(name, root, **keys)
    line = str(caught.value)
    assert "\n" not in line
    assert "Traceback" not in line
    return line
