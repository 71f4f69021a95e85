"""The example in docs/new_method.md is a method: found, trained, tested like any other."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import fedprompt.methods
from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.cli.method_table import method_rows
from fedprompt.config.schema import Config
from fedprompt.experiment.checkpoint import read_tensors
from fedprompt.experiment.compose import compose
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import run
from fedprompt.methods.base import Task
from fedprompt.methods.registry import METHODS, method_class
from tests.support import ROOT
from tests.support.builders import CLASS_NAMES, batch_of
from tests.support.distributions import write_distribution

DOC = ROOT / "docs" / "new_method.md"


def code() -> str:
    return re.findall(r"^```python\n(.*?)^```", DOC.read_text(), re.MULTILINE | re.DOTALL)[0]


@pytest.fixture
def task_res(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example as a file beside the shipped methods."""
    (tmp_path / "task_res.py").write_text(code())
    monkeypatch.setattr(fedprompt.methods, "__path__", [*fedprompt.methods.__path__, str(tmp_path)])
    yield
    sys.modules.pop("fedprompt.methods.task_res", None)


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example as a package of its own, which adds the method through an entry point."""
    write_distribution(
        tmp_path / "site",
        "task-res",
        {"task_res_paper/__init__.py": "", "task_res_paper/method.py": code()},
        {"fedprompt.methods": {"task_res": "task_res_paper.method:TaskRes"}},
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    for module in ("task_res_paper.method", "task_res_paper"):
        sys.modules.pop(module, None)


def test_the_example_is_short() -> None:
    body = code().split("class TaskRes(Method):")[1]
    lines = [line for line in body.splitlines() if line.strip()]
    assert len(lines) <= 30


def test_the_example_is_found_and_is_the_papers(task_res: None, clip: FrozenCLIP) -> None:
    cls = method_class("task_res")
    method = cls(cls.Config(alpha=0.5), clip, Task(CLASS_NAMES))
    x = torch.randn(6, clip.embed_dim, generator=torch.Generator().manual_seed(0))
    v = torch.nn.functional.normalize(torch.ones(1, 1, clip.embed_dim), dim=-1)
    start = clip.zero_shot_classifier(CLASS_NAMES, ("a photo of a {}.",))
    expected = [
        clip.logit_scale * float(v[0, 0] @ t / t.norm())
        for t in (start[c] + 0.5 * x[c] for c in range(6))
    ]
    encoded = method.encode({"residual": x[None]}, {})
    data = batch_of(v, torch.zeros(1, 1, dtype=torch.long))
    # Class features are packed in another order here, and a cosine near 0 is exact to 1e-7 only.
    approximately = pytest.approx(expected, rel=1e-5, abs=1e-7 * float(clip.logit_scale))
    assert method.logits(encoded, data.inputs)[0, 0].tolist() == approximately


def test_the_example_federates(task_res: None, run_config: Callable[..., Config]) -> None:
    folder = run(run_config(method={"name": "task_res"}), QuietDisplay())
    tensors, _ = read_tensors(folder / "prompts.safetensors")
    assert tensors["shared/residual"].abs().amax() > 0


def test_a_package_of_its_own_needs_no_file_of_ours(
    distribution: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "task_res" in fedprompt.methods.names()
    config = compose("label_skew", ["method=task_res", "method.alpha=0.25"])
    assert (config.method.name, config.method.alpha) == ("task_res", 0.25)
    assert [row for row in method_rows() if row[0] == "task_res"]
    result = fedprompt.run(
        "label_skew", method="task_res", partition={"clients": 2, "alpha": 1.0},
        data={"images_per_class": 8, "domains": ["savanna"]},
        **{"federation.rounds": 1, "evaluation.local_only": False, "output.report": False,
           "output.dir": tmp_path / "run"},
    )  # fmt: skip
    tensors, _ = read_tensors(result.path / "prompts.safetensors")
    assert tensors["shared/residual"].abs().amax() > 0


def test_the_documented_entry_point_is_the_tested_one(distribution: None) -> None:
    block = re.findall(r"^```toml\n(.*?)^```", DOC.read_text(), re.MULTILINE | re.DOTALL)[0]
    table = tomllib.loads(block)["project"]["entry-points"]
    assert table == {METHODS.package: {"task_res": "task_res_paper.method:TaskRes"}}
    assert METHODS.get("task_res").__module__ == "task_res_paper.method"
