"""Experiment files in a folder of the test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

BASE = "backbone: tiny\nmethod: fedrsclip\nstrategy: fedavg\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes an experiment file and returns its path."""

    def make(text: str | bytes, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


@pytest.fixture
def base(write: Callable[..., Path]) -> Path:
    return write(BASE, "base.yaml")
