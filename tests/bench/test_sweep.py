"""The benchmark of a sweep against single commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedprompt.bench.cli import app as bench_app
from fedprompt.errors import UserError


def test_bench_wants_whole_tables() -> None:
    done = CliRunner().invoke(bench_app, ["sweep", "--runs", "9"])
    assert isinstance(done.exception, UserError)
    assert "multiple of 8" in str(done.exception)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bench_compares_a_sweep_with_single_commands(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    arguments = ["--runs", "8", "--rounds", "1", "--images-per-class", "8", "--json", str(rows)]
    done = CliRunner().invoke(bench_app, ["sweep", *arguments])
    assert done.exception is None, done.output
    (row,) = json.loads(rows.read_text())
    assert row["different"] == 0
    assert row["ratio"] == row["reference_s"] / row["ours_s"]
