"""`bench vision`: both paths compute the same, and a difference ends the run."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import fedprompt.bench.cli as cli
from fedprompt.backbone.vision_tower import VisionTower
from fedprompt.bench.compare import MismatchError
from fedprompt.bench.vision import prompt_shapes
from fedprompt.errors import UserError


@pytest.mark.parametrize("patches", [[], ["--patches"]])
def test_rows(bench: Any, patches: list[str]) -> None:
    rows = bench(
        "vision",
        "--prompts",
        "3x1,2x2",
        "--clients",
        "2",
        "--batch",
        "3",
        "--repeats",
        "2",
        *patches,
    )
    assert [r["case"] for r in rows] == ["vision M=3 J=1 K=2 B=3", "vision M=2 J=2 K=2 B=3"]
    for line in rows:
        assert line["max_rel_diff"] < 1e-4
        assert line["repeats"] == 2
        assert line["ratio"] == pytest.approx(line["reference_s"] / line["ours_s"])
        assert line["counted_ratio"] > (1.05 if patches else 1.5)  # the last of two layers


def test_another_result_ends_the_run(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = VisionTower._plain
    monkeypatch.setattr(VisionTower, "_plain", lambda *a: right(*a) + torch.linspace(0, 0.01, 64))
    with pytest.raises(MismatchError, match=r"vision M=2 J=1 .* differ"):
        bench("vision", "--prompts", "2x1")


def test_prompt_shapes() -> None:
    assert prompt_shapes("4x1,8x12") == ((4, 1), (8, 12))
    for wrong in ("4", "4x", "x3", "4x0", "4x1;2x1", ""):
        with pytest.raises(UserError, match="tokens x layers"):
            prompt_shapes(wrong)


def test_too_many_layers_are_one_line(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", "vision", "--prompts", "2x3"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "--prompts 2x3" in message
    assert "2 layers" in message
    assert message.count("\n") == 1
