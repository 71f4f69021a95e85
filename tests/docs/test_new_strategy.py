"""The example in docs/new_strategy.md is a server rule: found, right, and federated."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

import fedprompt.federation.registry
import fedprompt.strategies
from fedprompt.experiment.checkpoint import read_tensors
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import run
from fedprompt.federation.registry import strategy_class
from fedprompt.federation.screening import Update
from tests.support import ROOT
from tests.support.builders import small_config

DOC = ROOT / "docs" / "new_strategy.md"
NAME = "geometric_median"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example as a file beside the shipped rules."""
    code = re.findall(r"^```python\n(.*?)^```", DOC.read_text(), re.MULTILINE | re.DOTALL)[0]
    (tmp_path / f"{NAME}.py").write_text(code)
    monkeypatch.setattr(
        fedprompt.strategies, "__path__", [*fedprompt.strategies.__path__, str(tmp_path)]
    )
    yield
    sys.modules.pop(f"fedprompt.strategies.{NAME}", None)


def test_it_is_the_geometric_median(example: None) -> None:
    cls = strategy_class(NAME)
    rule = cls(cls.Config(steps=200), shapes={"a": (2,), "b": (1,)}, seed=1)
    rows = np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0], [30, -40, 5]], dtype=np.float32)
    images = np.array([1, 2, 2, 3])
    shared = {"a": np.array([0.5, 0.5], np.float32), "b": np.array([0.5], np.float32)}
    updates = [
        Update(k, {"a": row[:2], "b": row[2:]}, int(n))
        for k, (row, n) in enumerate(zip(rows, images, strict=True))
    ]
    new = rule.aggregate(1, shared, updates)
    found = np.concatenate([new["a"], new["b"]])

    def total(z: np.ndarray) -> float:  # type: ignore[type-arg]
        return float((images * np.linalg.norm(rows - z, axis=1)).sum())

    best = minimize(total, rows.mean(0), method="Nelder-Mead", options={"xatol": 1e-7}).x
    assert found == pytest.approx(best, abs=1e-3)
    assert np.linalg.norm(found) < 2, "the far client of many images does not pull it away"


def test_it_federates(example: None, tmp_path: Path) -> None:
    found = []
    for name in (NAME, "fedavg"):
        output = {"dir": str(tmp_path / name)}
        folder = run(small_config(strategy={"name": name}, output=output), QuietDisplay())
        found.append(read_tensors(folder / "prompts.safetensors")[0]["shared/ctx"])
    assert not found[0].equal(found[1])
    assert (found[0] - found[1]).norm() < 0.5 * found[1].norm()
