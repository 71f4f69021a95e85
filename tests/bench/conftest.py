"""Benchmarks on a tiny backbone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fedprompt.bench.cli as cli
import fedprompt.bench.round as round_module
from fedprompt.backbone.clip import FrozenCLIP

KEYS = {"case", "ours_s", "reference_s", "ratio", "max_rel_diff", "peak_mb", "machine"}
"""Keys of every row."""


@pytest.fixture
def bench(
    clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., list[dict[str, Any]]]:
    """Run a subcommand on the random CLIP; returns its rows from the JSON file."""
    monkeypatch.setattr(cli, "random_clip", lambda name, **options: clip)
    monkeypatch.setattr(round_module, "random_clip", lambda name, **options: clip)

    def run(*arguments: str) -> list[dict[str, Any]]:
        target = tmp_path / "rows.json"
        result = CliRunner().invoke(cli.app, [*arguments, "--json", str(target)])
        if result.exception is not None:
            raise result.exception
        rows: list[dict[str, Any]] = json.loads(target.read_text())
        assert all(set(line) >= KEYS for line in rows)
        return rows

    return run
