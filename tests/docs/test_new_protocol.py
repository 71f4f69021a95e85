"""The example in docs/new_protocol.md is a protocol: found, measured, shown like any other."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fedprompt
import fedprompt.evaluation.protocols as protocols
from tests.support import ROOT

DOC = ROOT / "docs" / "new_protocol.md"
NAME = "top_k"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example as a file beside the shipped protocols."""
    code = re.findall(r"^```python\n(.*?)^```", DOC.read_text(), re.MULTILINE | re.DOTALL)[0]
    (tmp_path / f"{NAME}.py").write_text(code)
    monkeypatch.setattr(protocols, "__path__", [*protocols.__path__, str(tmp_path)])
    yield
    sys.modules.pop(f"fedprompt.evaluation.protocols.{NAME}", None)


def run_with(k: int, folder: Path) -> fedprompt.Result:
    changes: dict[str, Any] = {
        "data": {"images_per_class": 8, "domains": ["savanna"]},
        "partition": {"clients": 2, "alpha": 1.0},
        "protocols": ["global", NAME],
        "protocol_options": {NAME: {"k": k}},
        "federation.rounds": 1,
        "output.dir": folder,
    }
    return fedprompt.run("label_skew", **changes)


def test_its_numbers_are_right_at_both_ends(example: None, tmp_path: Path) -> None:
    first, every = run_with(1, tmp_path / "first"), run_with(99, tmp_path / "every")
    top_1 = first.summary["protocols"][NAME]["accuracy"]
    assert top_1["global"] == pytest.approx(first.summary["global"]["accuracy"])
    assert top_1["zero-shot"] == pytest.approx(first.summary["zero_shot"]["accuracy"])
    assert set(every.summary["protocols"][NAME]["accuracy"].values()) == {1.0}
    assert "Top-k accuracy" in first.table()
    assert (first.path / "plots" / f"protocol_{NAME}.png").is_file()
